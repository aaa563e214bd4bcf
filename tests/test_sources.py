"""Sources in memory: what is found where, which part is kept, and what is said when it is not there."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

from datasets.sources import CIFAR, CIFAR100, IMAGENET, open_source
from learning import build
from options import contrast
from options.linear import LinearOptions


def save_npz(path, size=32, **changes):
    arrays = {
        "train_images": np.arange(6 * size * size * 3, dtype=np.uint8).reshape(6, size, size, 3),
        "train_labels": np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8),
        "test_images": np.zeros((2, size, size, 3), np.uint8),
        "test_labels": np.array([0, 3]),
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_npz(tmp_path):
    source = open_source("npz", "train", folder=save_npz(tmp_path / "set.npz"))
    assert source.in_memory and len(source) == 6
    assert source.images.shape == (6, 3, 32, 32) and source.images.dtype == torch.uint8
    assert source.images[1, 2, 3, 4] == (1 * 32 * 32 * 3 + 3 * 32 * 3 + 4 * 3 + 2) % 256
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2] and source.labels.dtype == torch.int64
    assert source.classes == ("0", "1", "2", "3"), "both splits number their classes alike"
    assert (source.mean, source.std) == CIFAR
    source = open_source("npz", "val", folder=save_npz(tmp_path / "large.npz", size=40))
    assert len(source) == 2 and (source.mean, source.std) == IMAGENET


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_labels": None}, "must hold the arrays train_images, train_labels.*test_labels"),
        ({"train_images": np.zeros((6, 32, 32, 3), np.float32)}, "float32 .* must be uint8"),
        ({"train_images": np.zeros((6, 3, 32, 32), np.uint8)}, r"must be uint8 \(N, height, width, 3\)"),
        ({"train_images": np.zeros((6, 32, 32), np.uint8)}, r"must be uint8 \(N, .* repeat a grey channel"),
        ({"train_images": np.zeros((6, 32, 32, 4), np.uint8)}, r"must be uint8 \(N, .* leave out an alpha channel"),
        ({"train_images": np.zeros((5, 32, 32, 3), np.uint8)}, "5 train_images but 6 train_labels"),
        ({"train_labels": np.zeros(6)}, "train_labels .* one class number"),
        ({"test_labels": np.array([0, -1])}, "test_labels .* one class number"),
        ({"train_labels": np.array([None] * 6)}, "must hold plain arrays of numbers"),
    ],
)
def test_npz_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_source("npz", "train", folder=save_npz(tmp_path / "set.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn"])
def test_npz_that_are_none(tmp_path, content):
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not an .npz file"):
        open_source("npz", "train", folder=str(tmp_path / "set.npz"))
    with pytest.raises(ValueError, match="is not an .npz file"):
        open_source("npz", "train", folder=str(tmp_path))


def test_npz_of_a_single_class_has_no_labels(tmp_path):
    path = save_npz(tmp_path / "set.npz", train_labels=np.zeros(6, int), test_labels=np.zeros(2, int))
    source = open_source("npz", "train", folder=path)
    assert source.labels is None and source.classes == ()
    assert source.remarks == (f"{path} has a single class: its 6 images are used without labels.",)


def test_a_path_to_npz_says_what_it_is():
    chosen, origins, _ = contrast.parse(["--data_folder", "my/set.NPZ"])
    assert (chosen.dataset, origins["dataset"]) == ("npz", "implied by --data_folder")


def write(kind, root, files, monkeypatch):
    """Write files (name -> content) for torchvision's class `kind` and make it expect exactly these."""
    base = root / kind.base_folder
    base.mkdir(parents=True)
    for name, content in files.items():
        (base / name).write_bytes(content)
    for listed in ("train_list", "test_list"):
        sums = [[name, hashlib.md5(files[name]).hexdigest()] for name, _ in getattr(kind, listed)]
        monkeypatch.setattr(kind, listed, sums)
    if hasattr(kind, "meta"):
        meta = kind.meta["filename"]
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(files[meta]).hexdigest()})


@pytest.mark.parametrize("dataset, statistics", [("cifar10", CIFAR), ("cifar100", CIFAR100)])
def test_cifar(tmp_path, monkeypatch, dataset, statistics):
    kind = getattr(torchvision.datasets, dataset.upper())
    with pytest.raises(ValueError, match=f"no intact {dataset.upper()} in .* --download .* {kind.base_folder}"):
        open_source(dataset, "train", folder=str(tmp_path))
    pixels, key = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072), {10: "labels", 100: "fine_labels"}
    number = int(dataset.removeprefix("cifar"))
    parts = [name for name, _ in kind.train_list + kind.test_list]
    files = {name: pickle.dumps({"data": pixels, key[number]: [3, 7]}) for name in parts}
    names = [f"class {i}" for i in range(number)]
    write(kind, tmp_path, files | {kind.meta["filename"]: pickle.dumps({kind.meta["key"]: names})}, monkeypatch)
    source = open_source(dataset, "train", folder=str(tmp_path))
    assert source.images.shape == (2 * len(kind.train_list), 3, 32, 32) and source.images.dtype == torch.uint8
    assert torch.equal(source.images[1].flatten(), torch.from_numpy(pixels[1]))
    assert source.labels.tolist() == [3, 7] * len(kind.train_list)
    assert source.classes == tuple(names) and (source.mean, source.std) == statistics
    assert len(open_source(dataset, "val", folder=str(tmp_path / kind.base_folder))) == 2, "that folder is right too"


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """Three labelled training images, four without, two test images."""
    pixels = np.arange(4 * 3 * 96 * 96).astype(np.uint8).reshape(4, -1)
    files = {f"{part}_X.bin": pixels[:n].tobytes() for part, n in [("train", 3), ("unlabeled", 4), ("test", 2)]}
    files |= {"train_y.bin": bytes([1, 10, 2]), "test_y.bin": bytes([5, 1])}
    write(torchvision.datasets.STL10, tmp_path, files, monkeypatch)
    return str(tmp_path)


def test_stl10(stl10):
    source = open_source("stl10", "train", folder=stl10)
    assert source.images.shape == (7, 3, 96, 96) and source.labels is None and (source.mean, source.std) == IMAGENET
    labelled = open_source("stl10", "labelled", folder=stl10)
    assert labelled.labels.tolist() == [0, 9, 1] and labelled.classes[9] == "truck"
    assert torch.equal(labelled.images, source.images[:3])
    assert labelled.images[0, 0, 1, 2] == 2 * 96 + 1, "stored column by column"
    val = open_source("stl10", "val", folder=stl10)
    assert val.labels.tolist() == [4, 0] and val.classes == labelled.classes


def test_evaluations_take_the_labelled_images(stl10):
    opt = LinearOptions(dataset="stl10", data_folder=stl10)
    train, test = build.labelled_sources(opt, build.source(opt, "train"))
    assert len(train) == 3 and len(test) == 2
    same = build.labelled_sources(opt, train)[0]
    assert same is train, "nothing is opened twice"


def test_statistics_of_the_user_replace_those_of_the_data():
    source = build.source(LinearOptions(dataset="shapes", mean=(0.1, 0.2, 0.3)), "val")
    assert source.mean == (0.1, 0.2, 0.3) and source.std == open_source("shapes", "val").std


def test_download(tmp_path, monkeypatch):
    asked = []

    class Fetched:
        base_folder, filename, url = "base", "archive", "http://somewhere"

        def __init__(self, root, train, download):
            asked.append((root, download))
            (tmp_path / "new").mkdir(exist_ok=True)
            self.data, self.targets, self.classes = np.zeros((4, 32, 32, 3), np.uint8), [0, 1, 0, 1], ["a", "b"]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fetched)
    folder = str(tmp_path / "new")
    assert len(build.source(LinearOptions(dataset="cifar10", data_folder=folder, download=True), "train")) == 4
    assert asked[0] == (folder, True), "the first look fetches"


def test_a_download_that_fails(tmp_path, monkeypatch):
    def offline(*arguments, **keywords):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(ValueError, match="CIFAR10 could not be fetched .*no route to host.*by hand, from https://"):
        open_source("cifar10", "train", folder=str(tmp_path / "new"), download=True)


def test_shapes():
    source = open_source("shapes", "val")
    assert source.images.shape[1:] == (3, 32, 32) and source.images.dtype == torch.uint8
    assert len(source.labels) == len(source) and set(source.labels.tolist()) == set(range(len(source.classes)))


def test_a_fraction_is_a_fixed_part_of_every_class(tmp_path):
    path = save_npz(
        tmp_path / "set.npz",
        train_images=np.arange(230, dtype=np.uint8).reshape(230, 1, 1, 1).repeat(3, 3),
        train_labels=np.repeat([0, 1, 2], [200, 29, 1]),
    )

    def kept(fraction):
        source = open_source("npz", "train", folder=path, fraction=fraction)
        assert torch.equal(source.labels, torch.bucketize(source.images[:, 0, 0, 0].int(), torch.tensor([199, 228])))
        return source.images[:, 0, 0, 0].tolist(), source

    (tenth, source), (half, _), (whole, full) = kept(0.1), kept(0.5), kept(1.0)
    assert source.labels.bincount().tolist() == [20, 3, 1], "of each class alike, and never none"
    assert set(tenth) < set(half) < set(whole) and tenth == sorted(tenth) == kept(0.1)[0]
    assert source.classes == full.classes and full.remarks == ()
    assert source.remarks[0].startswith("--data_fraction 0.1 keeps 24 of the 230 training images, ")
    assert len(open_source("npz", "val", folder=path, fraction=0.1)) == 2, "never of the val images"


@pytest.mark.parametrize(
    "dataset, folder, message",
    [
        ("imagnet", "{}", "unknown --dataset 'imagnet'; choose one of shapes, cifar10"),
        ("cifar10", None, "--dataset cifar10 reads files.* --data_folder"),
        ("folder", "{}/none", "--data_folder .*none does not exist"),
        ("stl10", "{}", "no intact STL10 in .* --download .* stl10_binary"),
    ],
)
def test_missing_things_are_named(tmp_path, dataset, folder, message):
    with pytest.raises(ValueError, match=message):
        open_source(dataset, "train", folder=folder and folder.format(tmp_path))


def test_a_fingerprint_tells_other_images_and_other_labels_but_not_another_place(tmp_path):
    def folder(at, *names):
        for name in names:
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).touch()  # never opened
        return open_source("folder", "train", folder=str(at)).fingerprint()

    names = ["train/a/1.png", "train/a/2.png", "train/b/3.png", "val/a/4.png"]
    here, there = folder(tmp_path / "here", *names), folder(tmp_path / "some" / "where" / "else", *names)
    assert here == there
    assert folder(tmp_path / "other", "train/a/1.png", "train/b/2.png", "train/b/3.png", "val/a/4.png") != here
    arrays = open_source("npz", "train", folder=save_npz(tmp_path / "set.npz"))
    assert arrays.fingerprint() == open_source("npz", "train", folder=save_npz(tmp_path / "copy.npz")).fingerprint()
    changed = arrays.images.clone()
    changed[5, 2, 31, 31] += 1
    others = (replace(arrays, images=changed), replace(arrays, labels=arrays.labels.flip(0)))
    assert len({source.fingerprint() for source in (arrays, *others)}) == 3
