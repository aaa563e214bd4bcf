"""Where images come from: small sets held in memory, large ones as a list of files."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from datasets.decode import read_image
from datasets.keyed import hash64

Split = Literal["train", "labelled", "val"]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

SMALL = 64  # input resolutions up to this one get the small-image recipes
CIFAR: Statistics = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100: Statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """One split of a data set.

    images: uint8 (N, 3, H, W), or N paths; labels: int64 (N,), the rank among `classes`, or None;
    mean, std: of the RGB channels of images in 0..1; remarks: sentences a user should read before training starts;
    read: makes uint8 (3, H, W) of a path.
    """

    images: Tensor | tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    remarks: tuple[str, ...] = ()
    read: Callable[[str], Tensor] = read_image

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    def picture(self, index: int) -> Image.Image:
        """One image in RGB. ValueError where its file cannot be read."""
        image = self.images[index] if self.in_memory else self.read(self.images[index])
        return Image.fromarray(image.permute(1, 2, 0).numpy())

    def part(self, which: Tensor, *remarks: str) -> "Source":
        """The images where `which` (N,) bool is set, or those numbers (n,), with further remarks; the classes stay."""
        index = torch.arange(len(self))[which]
        images = self.images[index] if self.in_memory else tuple(self.images[i] for i in index.tolist())
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=images, labels=labels, remarks=self.remarks + remarks)

    def share(self, fraction: float, *, root: Path, salt: str) -> Tensor:
        """A mask (N,) of a fixed `fraction` of the images, of each class alike and at least one.

        It hangs on nothing but each image's path below `root` (its number, for images held in memory), so it is the
        same in every run and place; a smaller fraction is a part of a larger one. Other salts choose independently.
        """
        labels = self.labels if self.labels is not None else torch.zeros(len(self), dtype=torch.int64)
        order = hash64(self._identities(root), salt).argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]  # class by class, each in the order of its hashes
        sizes = labels.bincount()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(self)) - (sizes.cumsum(0) - sizes)[labels[order]]
        return rank < (fraction * sizes.double()).round().clamp(min=1)[labels]

    def fingerprint(self) -> int:
        """CRC-32 of what sample numbers mean: pixels or paths, and labels. Files are not opened.

        Paths count from the folder that all have in common, so the same files elsewhere have the same fingerprint.
        """
        if self.in_memory:
            content = self.images.numpy()
        else:
            common = len(os.path.dirname(os.path.commonprefix(self.images)))
            content = os.fsencode("\0".join(path[common:] for path in self.images))
        return zlib.crc32(b"" if self.labels is None else self.labels.numpy(), zlib.crc32(content))

    def _identities(self, root: Path) -> Tensor:
        if self.in_memory:
            return torch.arange(len(self))
        prefix = os.path.join(root, "")
        return torch.tensor([zlib.crc32(os.fsencode(path.removeprefix(prefix))) for path in self.images])


def open_source(
    dataset: str,
    split: Split,
    *,
    folder: str | None = None,
    imagenet100path: str | None = None,
    download: bool = False,
    fraction: float = 1.0,
) -> Source:
    """Open one split of a data set.

    dataset: shapes (drawn, needs no folder); cifar10, cifar100, stl10 (`folder` is where torchvision looks, and with
    `download` puts them); npz (`folder` is one file); folder (a folder of images or a list file, `folders.folder`);
    imagenet (`folder`/train/<class>/ and `folder`/val/<class>/), imagenet100 (the same, only the classes listed in the
    file `imagenet100path`). split: train is what pre-training sees, labelled the training images that have labels (the
    same but for stl10), val what evaluations are tested on. `fraction` of the training images are kept.
    Raises ValueError for an unknown data set and for missing or unsuitable files.
    """
    openers = _openers(download, imagenet100path)
    if dataset not in openers:
        raise ValueError(f"unknown --dataset {dataset!r}; choose one of {', '.join(openers)}.")
    if dataset != "shapes" and folder is None:
        raise ValueError(f"--dataset {dataset} reads files; say where they are with --data_folder.")
    if dataset != "shapes" and not (download or os.path.exists(folder)):
        raise ValueError(f"--data_folder {folder} does not exist; check the path.")
    path = Path(folder or "")
    source = openers[dataset](path, split)
    if split == "val" or fraction == 1:
        return source
    kept = source.share(fraction, root=path.parent if path.is_file() else path, salt="fraction")
    return source.part(
        kept,
        f"--data_fraction {fraction:g} keeps {int(kept.sum())} of the {len(source)} training images, "
        "the same ones under every seed.",
    )


def _openers(download: bool, listing: str | None) -> dict[str, Callable[[Path, Split], Source]]:
    from datasets import folders, packed  # not above: they make sources, so they import this module

    return {
        "shapes": lambda path, split: packed.shapes(split),
        "cifar10": partial(packed.cifar10, download=download),
        "cifar100": partial(packed.cifar100, download=download),
        "stl10": partial(packed.stl10, download=download),
        "npz": packed.npz,
        "imagenet": folders.imagenet,
        "imagenet100": partial(folders.imagenet100, listing=listing),
        "folder": folders.folder,
    }
