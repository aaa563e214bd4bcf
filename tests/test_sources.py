"""Sources: what is found where, how it is numbered, and what is said when it is not there."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.sources import CIFAR, IMAGENET, open_source


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


def save_folder(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    return str(root)


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


def test_folder(tmp_path):
    names = ("train/b/2.jpg", "train/b/10.PNG", "train/a/deep/er/x.jpeg", "train/c/1.webp", "val/a/1.jpg")
    folder = save_folder(tmp_path, *names)
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "list.jpg").write_text("not in a class folder")
    source = open_source("folder", "train", folder=folder)
    assert not source.in_memory and source.classes == ("a", "b", "c") and source.labels.tolist() == [0, 1, 1, 2]
    assert [path.removeprefix(folder + "/train/") for path in source.images] == [
        "a/deep/er/x.jpeg",
        "b/10.PNG",
        "b/2.jpg",
        "c/1.webp",
    ]
    assert len(open_source("imagenet", "val", folder=folder)) == 1


def test_imagenet100(tmp_path):
    folder = save_folder(tmp_path, *(f"train/n{i}/1.jpg" for i in range(5)))
    (tmp_path / "list.txt").write_text("n3\nn1\n\nn4\n")
    source = open_source("imagenet100", "train", folder=folder, imagenet100path=str(tmp_path / "list.txt"))
    assert source.classes == ("n1", "n3", "n4") and source.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="100 of the 100 classes .*imagenet100.txt have no folder"):
        open_source("imagenet100", "train", folder=folder)
    with pytest.raises(ValueError, match="--imagenet100path .* is not a file"):
        open_source("imagenet100", "train", folder=folder, imagenet100path=str(tmp_path / "none.txt"))


def test_cifar10(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no intact CIFAR-10 in .*cifar-10-batches-py"):
        open_source("cifar10", "train", folder=str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 7]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    source = open_source("cifar10", "train", folder=str(tmp_path))
    assert source.images.shape == (10, 3, 32, 32) and source.labels.tolist() == [3, 7] * 5
    assert torch.equal(source.images[1].flatten(), torch.from_numpy(pixels[1]))
    assert source.classes == tuple("abcdefghij") and (source.mean, source.std) == CIFAR


def test_shapes():
    source = open_source("shapes", "val")
    assert source.images.shape[1:] == (3, 32, 32) and source.images.dtype == torch.uint8
    assert len(source.labels) == len(source) and set(source.labels.tolist()) == set(range(len(source.classes)))


@pytest.mark.parametrize(
    "dataset, folder, message",
    [
        ("imagnet", "{}", "unknown --dataset 'imagnet'; choose one of shapes, cifar10"),
        ("cifar10", None, "--dataset cifar10 reads files.* --data_folder"),
        ("folder", "{}/none", "--data_folder .*none does not exist"),
        ("folder", "{}", "has no folder 'train'"),
        ("folder", "{}/empty", "no images in .*train/<class>/"),
        ("imagenet100", "{}", "has no folder 'train'"),
    ],
)
def test_missing_things_are_named(tmp_path, dataset, folder, message):
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        open_source(dataset, "train", folder=folder and folder.format(tmp_path))
