"""Where images come from: small sets held in memory, large ones as a list of files."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from torch import Tensor

Split = Literal["train", "val"]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

SMALL = 64  # input resolutions up to this one get the small-image recipes
CIFAR: Statistics = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """One split of a data set.

    images: uint8 (N, 3, H, W), or N paths; labels: int64 (N,), the rank among `classes`, or None;
    mean, std: of the RGB channels of images in 0..1.
    """

    name: str
    images: Tensor | tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)


def open_source(dataset: str, split: Split, *, folder: str | None = None, imagenet100path: str | None = None) -> Source:
    """Open one split of a data set.

    dataset: shapes (drawn, needs no folder), cifar10 (`folder` holds cifar-10-batches-py), npz (`folder` is one file
    with train_images, train_labels, test_images and test_labels), imagenet or folder (`folder`/train/<class>/ and
    `folder`/val/<class>/), imagenet100 (the same, only the classes listed in the file `imagenet100path`).
    Raises ValueError for an unknown data set and for missing or unsuitable files.
    """
    if dataset == "shapes":
        return _shapes(split)
    openers = {"cifar10": _cifar10, "npz": _npz, "imagenet": _folder, "folder": _folder, "imagenet100": _imagenet100}
    if dataset not in openers:
        raise ValueError(f"unknown --dataset {dataset!r}; choose one of shapes, {', '.join(openers)}.")
    if folder is None:
        raise ValueError(f"--dataset {dataset} reads files; say where they are with --data_folder.")
    if not os.path.exists(folder):
        raise ValueError(f"--data_folder {folder} does not exist; check the path.")
    extra = {"path": imagenet100path} if dataset == "imagenet100" else {}
    return openers[dataset](dataset, split, Path(folder), **extra)


def _shapes(split: Split) -> Source:
    from datasets import shapes

    images, labels = shapes.render(split)
    return Source("shapes", _channels_first(images), torch.tensor(labels), shapes.CLASSES, shapes.MEAN, shapes.STD)


def _cifar10(name: str, split: Split, folder: Path) -> Source:
    try:
        data = torchvision.datasets.CIFAR10(str(folder), train=split == "train")
    except RuntimeError as error:
        raise ValueError(
            f"no intact CIFAR-10 in {folder}; unpack cifar-10-python.tar.gz there, "
            "so that it holds the folder cifar-10-batches-py."
        ) from error
    return Source(name, _channels_first(data.data), torch.tensor(data.targets), tuple(data.classes), *CIFAR)


def _npz(name: str, split: Split, path: Path) -> Source:
    part = "train" if split == "train" else "test"
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
    size = tuple(images.shape[1:3])
    classes = tuple(str(c) for c in range(max(int(found.max()) for found in both.values()) + 1))
    statistics = CIFAR if size == (32, 32) else IMAGENET
    return Source(name, _channels_first(images), torch.from_numpy(both[part].astype(np.int64)), classes, *statistics)


def _check_arrays(path: Path, part: str, images: np.ndarray, labels: dict[str, np.ndarray]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"{part}_images in {path} is {images.dtype} {images.shape}; it must be uint8 (N, height, width, 3)."
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


def _folder(name: str, split: Split, folder: Path) -> Source:
    return _image_folder(name, folder / split, _class_folders(folder, split))


def _imagenet100(name: str, split: Split, folder: Path, path: str | None) -> Source:
    listing = Path(path or Path(__file__).with_name("imagenet100.txt"))
    if not listing.is_file():
        raise ValueError(f"--imagenet100path {listing} is not a file; give a text file with one class folder per line.")
    classes = sorted({line.split()[0] for line in listing.read_text().splitlines() if line.strip()})
    unknown = sorted(set(classes) - set(_class_folders(folder, split)))
    if unknown or not classes:
        raise ValueError(
            f"{len(unknown)} of the {len(classes)} classes in {listing} have no folder in {folder / split} "
            f"(for example {unknown[:3]}); pass the folder of the full ImageNet or another --imagenet100path."
        )
    return _image_folder(name, folder / split, classes)


def _class_folders(folder: Path, split: Split) -> list[str]:
    root = folder / split
    if not root.is_dir():
        raise ValueError(f"{folder} has no folder {split!r}; put the images in {root}/<class>/<image>.")
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def _image_folder(name: str, root: Path, classes: list[str]) -> Source:
    """Labels are ranks in the sorted class names, files are sorted: the same numbering on every machine."""
    found = [(path, label) for label, c in enumerate(classes) for path in _image_files(root / c)]
    if not found:
        raise ValueError(f"no images in {root}/<class>/; supported file names end in {', '.join(EXTENSIONS)}.")
    paths, labels = zip(*found)
    return Source(name, paths, torch.tensor(labels), tuple(classes), *IMAGENET)


def _image_files(folder: Path) -> list[str]:
    walk = os.walk(folder, followlinks=True)
    return sorted(os.path.join(at, f) for at, _, files in walk for f in files if f.lower().endswith(EXTENSIONS))


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
