"""Loaders and recipes: the same batches for any number of workers, any split over processes, and after a resume."""

from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from datasets.keyed import sample_keys
from datasets.loader import EvalLoader, KeyedSampler, TrainLoader
from datasets.recipes import RECIPES, evaluation, probe
from datasets.sources import CIFAR, Source, open_source


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


def mocov2(source, res=32):
    return RECIPES["mocov2"](res, (0.2, 1.0), source.mean, source.std)


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
    assert "label" not in next(iter(EvalLoader(memory, evaluation(32, *CIFAR), batch_size=8)))


@pytest.mark.parametrize("kind, res", [("memory", 32), ("files", 80)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_hold_the_rows_of_one(request, kind, res, recipe):
    source = request.getfixturevalue(kind)
    views = RECIPES[recipe](res, (0.2, 1.0), source.mean, source.std)
    whole = TrainLoader(source, views, batch_size=12)
    halves = [TrainLoader(source, views, batch_size=12, rank=r, world_size=2) for r in range(2)]
    for batch, *parts in zip(whole, *halves):
        for name, value in batch.items():
            together = torch.cat([part[name] for part in parts])
            if value.dtype == torch.int64:
                assert torch.equal(value, together)
            else:
                assert (value - together).abs().max() < 1e-6  # 0 so far, but BLAS may choose by batch size


def test_workers_change_nothing(files):
    before = torch.get_rng_state()
    loaders = [TrainLoader(files, mocov2(files, 80), batch_size=4, num_workers=w) for w in (0, 2)]
    for epoch, start_step in [(0, 0), (3, 1)]:
        for loader in loaders:
            loader.set_epoch(epoch, start_step)
        assert_same(*loaders)
    assert torch.equal(before, torch.get_rng_state())


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
    recipe = probe(32, (0.2, 1.0), *CIFAR, randaugment=randaugment)
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
        batch = next(iter(TrainLoader(source, mocov2(source, res), batch_size=4, device="meta")))
        assert {value.device.type for value in batch.values()} == {"meta"}
        assert batch["query"].shape == (4, 3, res, res)


def test_file_and_memory_crops_agree(memory):
    """The worker path rounds to uint8 after either pass of the resizing, the batched path does not."""
    recipe, keys = mocov2(memory), sample_keys(0, 0, torch.arange(20))
    batched = recipe.crop_batch(memory.images[:20], keys)
    for i, key in enumerate(keys.tolist()):
        single = recipe.crop(F.to_pil_image(memory.images[i]), key)
        for view in recipe.views:
            assert single[view].dtype == torch.uint8
            assert (single[view].float() / 255 - batched[view][i]).abs().max() < 1.02 / 255


def test_finish_applies_what_parameters_says(memory):
    recipe, keys = mocov2(memory, 65), sample_keys(0, 0, torch.arange(20))
    crops = (torch.rand(20, 3, 65, 65, generator=torch.Generator().manual_seed(1)) * 255).byte()
    drawn, kept = recipe.parameters(keys, "query"), crops.clone()
    finished = recipe.finish({"query": crops}, keys)["query"]
    assert torch.equal(crops, kept), "finish must not change its input"
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    factors = [drawn[name].tolist() for name in ("brightness", "contrast", "saturation", "hue")]
    for i in range(20):
        image = crops[i].float() / 255
        for number in drawn["order"][i].tolist():
            image = adjust[number](image, factors[number][i]) if number >= 0 else image
        image = F.rgb_to_grayscale(image, 3) if drawn["gray"][i] else image
        sigma = drawn["sigma"][i].item()
        image = F.gaussian_blur(image, [31, 31], sigma) if sigma > 0 else image
        assert (finished[i] - F.normalize(image, memory.mean, memory.std)).abs().max() < 1e-3


def close(values, share):
    return abs(values.float().mean().item() - share) < 0.03


def test_recipes_draw_as_published(memory):
    keys = torch.arange(4000)
    v2, small, v1 = (RECIPES[n](r, (0.2, 1.0), *CIFAR) for n, r in [("mocov2", 224), ("mocov2", 32), ("mocov1", 224)])
    drawn = v2.parameters(keys, "key")
    assert close(drawn["order"][:, 0] >= 0, 0.8) and close(drawn["gray"], 0.2) and close(drawn["flip"], 0.5)
    assert (
        close(drawn["sigma"] > 0, 0.5) and drawn["sigma"].max() <= 2 and drawn["sigma"][drawn["sigma"] > 0].min() >= 0.1
    )
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
    ]:
        assert low <= drawn[name].min() < low + 0.01 and high - 0.01 < drawn[name].max() <= high
    assert not small.parameters(keys, "key")["sigma"].any()
    old = v1.parameters(keys, "key")
    assert (old["order"] >= 0).all() and not old["sigma"].any() and old["hue"].abs().max() > 0.39
    assert not torch.equal(old["crop"], v1.parameters(keys, "query")["crop"])


def test_simclr_draws_strong_colours_and_half_of_them_for_small_images():
    keys = torch.arange(4000)
    large, small = (RECIPES["simclr"](res, (0.08, 1.0), *CIFAR).parameters(keys, "key") for res in (224, 32))
    for drawn, strength in ((large, 1.0), (small, 0.5)):
        assert close(drawn["order"][:, 0] >= 0, 0.8) and close(drawn["gray"], 0.2)
        for name in ("brightness", "contrast", "saturation"):
            assert drawn[name].min() == pytest.approx(1 - 0.8 * strength, abs=0.01)
            assert drawn[name].max() == pytest.approx(1 + 0.8 * strength, abs=0.01)
        assert drawn["hue"].abs().max() == pytest.approx(0.2 * strength, abs=0.01)
    assert close(large["sigma"] > 0, 0.5) and not small["sigma"].any()


@pytest.mark.parametrize("world_size", [1, 3])
def test_eval_loader_shows_every_image_once_in_order(memory, files, world_size):
    for source, res, workers in [(memory, 32, 0), (files, 80, 1)]:
        recipe = evaluation(res, source.mean, source.std)
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
    recipe = evaluation(32, *CIFAR)
    shards = [list(EvalLoader(few, recipe, batch_size=4, rank=r, world_size=3)) for r in range(3)]
    assert [sum(len(batch["index"]) for batch in shard) for shard in shards] == [0, 1, 1]


def test_evaluation_view_is_resize_then_centre_crop(files, memory):
    recipe = evaluation(224, *CIFAR)
    picture = Image.open(files.images[0]).convert("RGB")
    expected = F.pil_to_tensor(F.center_crop(F.resize(picture, 256), 224))
    assert torch.equal(recipe.crop(picture, 0)["image"], expected)
    large = recipe.crop_batch(F.pil_to_tensor(picture)[None], torch.zeros(1, dtype=torch.int64))["image"][0]
    assert (large - expected / 255).abs().max() < 1.5 / 255
    small = evaluation(32, *CIFAR).crop_batch(memory.images, torch.arange(50))["image"]
    assert torch.equal(small, memory.images / 255)


def test_sampler_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="--batch_size 10 is not a multiple of the 3 processes"):
        KeyedSampler(50, batch_size=10, rank=0, world_size=3, seed=0)
    with pytest.raises(ValueError, match="more than the 50 images"):
        KeyedSampler(50, batch_size=64, rank=0, world_size=1, seed=0)


def test_a_broken_file_is_named(files):
    Path(files.images[2]).write_bytes(b"no image")
    with pytest.raises(ValueError, match="04.jpg cannot be read as an image"):
        list(EvalLoader(files, evaluation(80, *CIFAR), batch_size=4))
