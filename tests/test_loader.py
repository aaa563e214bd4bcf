"""Loaders: the same batches for any number of workers, any split over processes, and after a resume."""

from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as F

from datasets import augment, decode, photometric, recipes
from datasets.colours import colours
from datasets.keyed import sample_keys
from datasets.loader import EvalLoader, KeyedSampler, TrainLoader
from datasets.recipes import evaluation, probe, training
from datasets.sources import CIFAR, Source, open_source
from learning import build
from options import contrast, linear

PLAIN = colours("RGB", "Lab", *CIFAR)


@pytest.fixture
def memory():
    g = torch.Generator().manual_seed(0)
    images = (torch.rand(50, 3, 32, 32, generator=g) * 255).byte()
    return Source(images, torch.randint(0, 4, (50,), generator=g), tuple("abcd"), *CIFAR)


@pytest.fixture
def files(tmp_path):
    g = torch.Generator().manual_seed(0)
    for i in range(12):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = F.resize(torch.rand(1, 3, 5, 5, generator=g), [70 + i, 90])[0]
        F.to_pil_image(pixels).convert("L" if i == 3 else "RGB").save(folder / f"{i:02}.jpg")
    return open_source("imagenet", "train", folder=str(tmp_path))


def mocov2(source, res=32, **more):
    seen = colours("RGB", "Lab", source.mean, source.std)
    return training("mocov2", views=("query", "key"), input_res=res, crop_min=0.2, colours=seen, **more)


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_have_the_promised_contents(memory):
    loader = TrainLoader(memory, mocov2(memory), batch_size=16, seed=1)
    loader.set_epoch(2)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch in batches:
        assert list(batch) == ["index", "key_draw", "label", "query", "key"]
        assert batch["query"].shape == batch["key"].shape == (16, 3, 32, 32)
        assert batch["query"].dtype == torch.float32 and batch["query"].is_contiguous()
        assert torch.equal(batch["key_draw"], sample_keys(1, 2, batch["index"]))
        assert torch.equal(batch["label"], memory.labels[batch["index"]])
        assert not torch.equal(batch["query"], batch["key"])
    seen = torch.cat([batch["index"] for batch in batches])
    assert len(seen.unique()) == 48
    loader.set_epoch(3)
    assert not torch.equal(next(iter(loader))["index"], batches[0]["index"])


def test_a_source_without_labels_yields_none(memory):
    memory = Source(memory.images, None, (), *CIFAR)
    assert "label" not in next(iter(TrainLoader(memory, mocov2(memory), batch_size=8)))
    assert "label" not in next(iter(EvalLoader(memory, evaluation(32, PLAIN), batch_size=8)))


@pytest.mark.parametrize("kind, res", [("memory", 32), ("files", 80)])
@pytest.mark.parametrize("recipe, modal", [("mocov2", "RGB"), ("byol", "RGB"), ("cmcv2", "CMC")])
def test_two_processes_hold_the_rows_of_one(request, kind, res, recipe, modal):
    source, seen = request.getfixturevalue(kind), colours(modal, "Lab", *CIFAR)
    pair, small = ("query", "key"), (1, 24, 0.05)
    views = training(recipe, views=pair, input_res=res, crop_min=0.2, colours=seen, small=small, jigsaw=True)
    whole = TrainLoader(source, views, batch_size=12)
    halves = [TrainLoader(source, views, batch_size=12, rank=r, world_size=2) for r in range(2)]
    for batch, *parts in zip(whole, *halves):
        for name, value in batch.items():
            together = torch.cat([part[name] for part in parts])
            if value.dtype == torch.int64:
                assert torch.equal(value, together)
            else:
                assert (value - together).abs().max() < 1e-6  # 0 so far, but BLAS may choose by batch size


@pytest.mark.parametrize("kind, res", [("memory", 32), ("files", 80)])
def test_dealt_views_are_those_of_other_samples(request, kind, res):
    """Row i of the global batch holds that view of sample order[i], whoever makes it."""
    source = request.getfixturevalue(kind)
    straight = TrainLoader(source, mocov2(source, res), batch_size=6)

    def exchange(rows):
        def of(x, order):
            (both,) = (b for b in crops if torch.equal(b[rows], x))
            return both[order[rows]]

        return of

    crops = (
        [x["key"] for x in TrainLoader(source, mocov2(source, res), batch_size=6).feed.loader]
        if kind == "files"
        else []
    )
    ranks = [
        TrainLoader(
            source, mocov2(source, res), batch_size=6, rank=r, world_size=2, dealt=["key"], exchange=exchange(rows)
        )
        for r, rows in enumerate((slice(0, 3), slice(3, 6)))
    ]
    for batch, *parts in zip(straight, *ranks):
        order, key = parts[0]["order"], torch.cat([part["key"] for part in parts])
        assert torch.equal(order, parts[1]["order"]) and not torch.equal(order, torch.arange(6))
        assert (key - batch["key"][order]).abs().max() < 1e-6
        assert torch.equal(torch.cat([part["query"] for part in parts]), batch["query"])


def test_workers_change_nothing(files):
    before = torch.get_rng_state()
    recipe = training("infomin", views=("query",), input_res=80, crop_min=0.2, colours=PLAIN, jigsaw=True)
    loaders = [TrainLoader(files, recipe, batch_size=4, num_workers=w) for w in (0, 2)]
    for epoch, start_step in [(0, 0), (3, 1)]:
        for loader in loaders:
            loader.set_epoch(epoch, start_step)
        assert_same(*loaders)
    assert torch.equal(before, torch.get_rng_state())


def test_how_many_images_are_held_changes_nothing(files, monkeypatch):
    recipe = training("infomin", views=("query",), input_res=80, crop_min=0.2, colours=PLAIN, jigsaw=True)
    loader = TrainLoader(files, recipe, batch_size=6)
    together = list(loader)
    monkeypatch.setattr("datasets.loader.ROOM", 50_000)  # two or three of them
    assert_same(loader, together)


def without_fast_paths(patch):
    for module, name in [(decode, "decode_jpeg"), (recipes, "interpolate"), (augment, "separable")]:
        patch.setattr(module, name, None)
    for name in ("color_jitter", "grayscale", "blur", "solarize"):
        patch.setattr(photometric, name, None)


@pytest.mark.parametrize("data", ["--dataset shapes", "--dataset folder --data_folder {}"])
def test_fast_paths_of_images_can_be_turned_off(files, tmp_path, monkeypatch, data):
    flags = f"{data} --batch_size 4 --seed 0 --num_workers 0 --input_res 80".format(tmp_path / "train").split()
    batches = []
    for more in ([], ["--no_fast_images"]):
        opt = contrast.parse([*flags, *more])[0]
        source = build.source(opt, "train").part(torch.arange(8))
        loaders = [build.train_loader(opt, source, torch.device("cpu"))]
        opt = linear.parse([*flags, *more])[0]
        loaders.append(build.eval_loader(opt, source, torch.device("cpu"), PLAIN))
        batches.append([next(iter(loader)) for loader in loaders])
        without_fast_paths(monkeypatch)
    for fast, slow in zip(*batches):
        assert fast.keys() == slow.keys()
        for name, view in fast.items():
            assert (slow[name] - view).abs().max() < 0.05, name  # a level of 255, in standard deviations


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_start_step_skips(request, kind):
    source = request.getfixturevalue(kind)
    loader = TrainLoader(source, mocov2(source), batch_size=4)
    loader.set_epoch(1)
    whole = list(loader)
    loader.set_epoch(1, start_step=2)
    assert_same(loader, whole[2:])


@pytest.mark.parametrize("randaugment", [False, True])
def test_global_generators_are_left_alone(memory, randaugment):
    before = torch.get_rng_state()
    recipe = probe(32, (0.2, 1.0), PLAIN, randaugment=randaugment)
    first = list(TrainLoader(memory, recipe, batch_size=16))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert_same(first, TrainLoader(memory, recipe, batch_size=16))
    assert [name for name in first[0] if name not in ("index", "key_draw", "label")] == ["image"]


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_the_host_never_waits_for_the_device(request, kind):
    """Tensors on the meta device hold no values, so whatever wanted to read one would fail."""
    source = request.getfixturevalue(kind)
    for res in (32, 80):
        recipe = mocov2(source, res, small=(1, 16, 0.05), jigsaw=True)
        batch = next(iter(TrainLoader(source, recipe, batch_size=4, device="meta")))
        assert {value.device.type for value in batch.values()} == {"meta"}
        assert batch["query"].shape == (4, 3, res, res) and batch["jigsaw"].shape[:3] == (4, 9, 3)


@pytest.mark.parametrize("world_size", [1, 3])
def test_eval_loader_shows_every_image_once_in_order(memory, files, world_size):
    for source, res, workers in [(memory, 32, 0), (files, 80, 1)]:
        recipe = evaluation(res, PLAIN)
        loaders = [
            EvalLoader(source, recipe, batch_size=7, rank=r, world_size=world_size, num_workers=workers)
            for r in range(world_size)
        ]
        batches = [batch for loader in loaders for batch in loader]
        assert sum(map(len, loaders)) == len(batches)
        assert list(batches[0]) == ["index", "label", "image"]
        assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(len(source)))
        assert torch.equal(torch.cat([batch["label"] for batch in batches]), source.labels)


def test_eval_loader_with_fewer_images_than_processes(memory):
    few = Source(memory.images[:2], memory.labels[:2], memory.classes, *CIFAR)
    recipe = evaluation(32, PLAIN)
    shards = [list(EvalLoader(few, recipe, batch_size=4, rank=r, world_size=3)) for r in range(3)]
    assert [sum(len(batch["index"]) for batch in shard) for shard in shards] == [0, 1, 1]


def test_sampler_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="--batch_size 10 is not a multiple of the 3 processes"):
        KeyedSampler(50, batch_size=10, rank=0, world_size=3, seed=0)
    with pytest.raises(ValueError, match="more than the 50 images"):
        KeyedSampler(50, batch_size=64, rank=0, world_size=1, seed=0)


def test_a_broken_file_is_named(files):
    Path(files.images[2]).write_bytes(b"no image")
    with pytest.raises(ValueError, match="04.jpg cannot be read as an image"):
        list(EvalLoader(files, evaluation(80, PLAIN), batch_size=4))
