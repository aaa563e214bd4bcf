"""Sets small enough to be held in memory: the built-in shapes, CIFAR, STL-10, and anybody's arrays."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from datasets.shapes import CLASSES, MEAN, STD, render
from datasets.sources import CIFAR, CIFAR100, IMAGENET, Source

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def shapes(split: str) -> Source:
    images, labels = render("val" if split == "val" else "train")
    return Source(_channels_first(images), torch.tensor(labels), CLASSES, MEAN, STD)


def cifar10(folder: Path, split: str, *, download: bool) -> Source:
    data = _torchvision(torchvision.datasets.CIFAR10, folder, download, train=split != "val")
    return Source(_channels_first(data.data), torch.tensor(data.targets), tuple(data.classes), *CIFAR)


def cifar100(folder: Path, split: str, *, download: bool) -> Source:
    data = _torchvision(torchvision.datasets.CIFAR100, folder, download, train=split != "val")
    return Source(_channels_first(data.data), torch.tensor(data.targets), tuple(data.classes), *CIFAR100)


def stl10(folder: Path, split: str, *, download: bool) -> Source:
    """STL-10 was cut from ImageNet, whose statistics it gets. Pre-training sees all 105,000 images without labels."""
    part = {"train": "train+unlabeled", "labelled": "train", "val": "test"}[split]
    data = _torchvision(torchvision.datasets.STL10, folder, download, split=part)
    images = torch.from_numpy(np.ascontiguousarray(data.data))
    if split == "train":
        return Source(images, None, (), *IMAGENET)
    return Source(images, torch.from_numpy(data.labels.astype(np.int64)), STL10_CLASSES, *IMAGENET)


def _torchvision(kind: type, folder: Path, download: bool, **part: Any) -> Any:
    """An object of torchvision's class `kind`; whether `folder` holds its folder or is that folder, both are right."""
    root = folder.parent if folder.name == kind.base_folder else folder
    try:
        return kind(str(root), download=download, **part)
    except (RuntimeError, OSError) as error:
        if download:
            raise ValueError(
                f"{kind.__name__} could not be fetched into {root} ({error}); put it there by hand, from {kind.url}."
            ) from error
        raise ValueError(
            f"no intact {kind.__name__} in {root}; add --download to fetch it, or unpack {kind.filename} there, "
            f"so that it holds the folder {kind.base_folder}."
        ) from error


def npz(path: Path, split: str) -> Source:
    """A file with train_images, train_labels, test_images and test_labels; uint8 (N, H, W, 3) and integers (N,)."""
    part = "test" if split == "val" else "train"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file; write it with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            both = {name: arrays[f"{name}_labels"] for name in ("train", "test")}
            images = arrays[f"{part}_images"]
    except KeyError as error:
        raise ValueError(
            f"{path} must hold the arrays train_images, train_labels, test_images and test_labels: {error.args[0]}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} must hold plain arrays of numbers ({error}).") from error
    _check_arrays(path, part, images, both)
    statistics = CIFAR if images.shape[1:3] == (32, 32) else IMAGENET
    classes = tuple(str(c) for c in range(max(int(found.max()) for found in both.values()) + 1))
    if len(classes) == 1:
        remark = f"{path} has a single class: its {len(images)} images are used without labels."
        return Source(_channels_first(images), None, (), *statistics, (remark,))
    return Source(_channels_first(images), torch.from_numpy(both[part].astype(np.int64)), classes, *statistics)


def _check_arrays(path: Path, part: str, images: np.ndarray, labels: dict[str, np.ndarray]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"{part}_images in {path} is {images.dtype} {images.shape}; it must be uint8 (N, height, width, 3): "
            "scale numbers to 0..255, repeat a grey channel three times, leave out an alpha channel."
        )
    for name, found in labels.items():
        if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found) or found.min() < 0:
            raise ValueError(
                f"{name}_labels in {path} is {found.dtype} {found.shape}; it must hold one class number >= 0 per image."
            )
    if len(labels[part]) != len(images):
        raise ValueError(
            f"{path} has {len(images)} {part}_images but {len(labels[part])} {part}_labels; save one label per image."
        )


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
