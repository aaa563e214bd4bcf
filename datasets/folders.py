"""Images as files: folders of classes, folders without any, list files, ImageNet and a part of it."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from datasets.sources import IMAGENET, Source

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VAL_FOLDERS = ("val", "valid", "validation", "test")
ROW = re.compile(rf"(.+(?:{'|'.join(map(re.escape, EXTENSIONS))}))(?:[\s,]+([^\s,]+))?", re.IGNORECASE)

Found = tuple[list[str], list[str] | None]  # paths, and the name of each one's class if there are classes


def folder(path: Path, split: str) -> Source:
    """Whatever lies in a folder, or is listed in a text file.

    path holds train/ and val/ (or valid/, validation/, test/), or is itself what train/ would be: a folder per class,
    or images directly and thus no labels. A list file has a line `path [label]` per image, with spaces or a comma
    between the two; the list of the val images stands beside it, with "val" for "train" in its name. Labels of a single
    class are none. Where no val images are set apart, a tenth of those of every class are held out; without labels all
    are for training. Raises ValueError for what looks like the level above or below.
    """
    read, train, val = _layout(path)
    paths, names = read(train)
    _check_level(path, train, names)
    source = _training(train, paths, names)
    if val is None:
        return _hold_out(source, split, path, train)
    return _validation(source, val, *read(val)) if split == "val" else source


def imagenet(path: Path, split: str) -> Source:
    """`path`/train/<class>/ and `path`/val/<class>/ with the same classes, whatever lies beside them."""
    root, classes = _split_folder(path, split), _folder_names(_split_folder(path, "train"))
    odd = sorted(set(classes) ^ set(_folder_names(root)))
    if odd:
        raise ValueError(
            f"{path / 'train'} and {root} differ in {len(odd)} classes (for example {', '.join(odd[:3])}); "
            "give both the same class folders."
        )
    return _classes_of(root, classes)


def imagenet100(path: Path, split: str, *, listing: str | None) -> Source:
    """ImageNet's layout, only the class folders named in the file `listing`; without one, in the list shipped."""
    listing = Path(listing or Path(__file__).with_name("imagenet100.txt"))
    if not listing.is_file():
        raise ValueError(f"--imagenet100path {listing} is not a file; give a text file with one class folder per line.")
    root = _split_folder(path, split)
    classes = sorted({line.split()[0] for line in listing.read_text().splitlines() if line.strip()})
    unknown = sorted(set(classes) - set(_folder_names(root)))
    if unknown or not classes:
        raise ValueError(
            f"{len(unknown)} of the {len(classes)} classes in {listing} have no folder in {root} "
            f"(for example {unknown[:3]}); pass the folder of the full ImageNet or another --imagenet100path."
        )
    return _classes_of(root, classes)


def _layout(path: Path) -> tuple[Callable[[Path], Found], Path, Path | None]:
    """How to read `path`, and where its training and its val images (if set apart) are."""
    if path.is_file():
        val = path.with_name(path.name.replace("train", "val"))
        return _listed, path, val if val != path and val.is_file() else None
    if not (path / "train").is_dir():
        return _below, path, None
    return _below, path / "train", next((path / name for name in VAL_FOLDERS if (path / name).is_dir()), None)


def _check_level(path: Path, train: Path, names: list[str] | None) -> None:
    """Refuse a folder that looks like the one above a data set, and a train/ that looks like one of several classes."""
    if names and len(set(names)) == 1 and (train / names[0] / "train").is_dir():
        raise ValueError(f"{train} holds train/ one level below: give --data_folder {train / names[0]}.")
    if names or train == path:
        return
    beside = [name for name in _folder_names(path) if name not in ("train", *VAL_FOLDERS)]
    beside = [name for name in beside if _image_files(path / name)]
    if beside:
        raise ValueError(
            f"{train} holds images directly, which makes it look like a class beside {', '.join(beside[:3])}; "
            f"rename it if it is one, or give --data_folder {train} to use its images alone."
        )


def _training(at: Path, paths: list[str], names: list[str] | None) -> Source:
    classes = tuple(sorted(set(names or ())))
    if at.is_file() and all(name.isdecimal() for name in classes):
        classes = tuple(sorted(classes, key=int))
    if len(classes) > 1:
        return Source(tuple(paths), _labels(names, classes), classes, *IMAGENET)
    directly = "lists no labels" if at.is_file() else "holds images directly"
    why = f"has a single class, {classes[0]}" if classes else directly
    remark = f"{at} {why}: all its {len(paths)} images are used for training, without labels."
    return Source(tuple(paths), None, (), *IMAGENET, (remark,))


def _validation(train: Source, at: Path, paths: list[str], names: list[str] | None) -> Source:
    """The images of val, their classes numbered as in training; it need not have all of them."""
    if train.labels is None:
        return Source(tuple(paths), None, (), *IMAGENET)
    if names is None:
        raise ValueError(f"{at} has no classes, unlike the training images; give its images theirs, or move it away.")
    odd = sorted(set(names) - set(train.classes))
    if odd:
        raise ValueError(
            f"{at} has {len(odd)} classes that the training images have not (for example {', '.join(odd[:3])}); "
            "give both the same classes."
        )
    return replace(train, images=tuple(paths), labels=_labels(names, train.classes))


def _hold_out(source: Source, split: str, path: Path, train: Path) -> Source:
    """Part `source`: a tenth for val, at least one image of every class that has two; the rest for training."""
    missing = f"{path} has no {'val list beside it' if path.is_file() else 'val/ folder'}"
    if source.labels is None:
        if split == "val":
            raise ValueError(f"{missing} and its images no labels, so there is nothing to evaluate on; add it.")
        return replace(source, remarks=(*source.remarks, *_unusual(path, train, source)))
    several = source.labels.bincount()[source.labels] > 1
    held = several & source.share(0.1, root=train.parent if train.is_file() else train, salt="held out")
    count = int(held.sum())
    if split == "val":
        if not count:
            raise ValueError(f"{missing} and every class a single image, so none can be held out; add it.")
        return source.part(held)
    said = f"{count} of {len(source)} images, a fixed tenth, are" if count else "with one image per class, none is"
    return source.part(~held, *_unusual(path, train, source), f"{missing}: {said} held out for evaluation.")


def _unusual(path: Path, train: Path, source: Source) -> Iterator[str]:
    """What tells a user that folders were not meant as they are taken."""
    beside = [name for name in _folder_names(path) if name != "train"] if train != path else []
    if beside:
        yield f"{train} is taken for the training images, and {', '.join(beside[:3])} beside it for something else."
    elif train == path and source.classes and path.is_dir():
        shown = ", ".join(source.classes[:3]) + (", ..." if len(source.classes) > 3 else "")
        yield f"{path} has no train/ folder: its {len(source.classes)} folders ({shown}) are the classes."


def _labels(names: list[str], classes: tuple[str, ...]) -> torch.Tensor:
    rank = {name: label for label, name in enumerate(classes)}
    return torch.tensor([rank[name] for name in names])


def _below(root: Path) -> Found:
    """All images below `root`; their classes are its folders, unless an image lies outside of them."""
    paths, prefix = _image_files(root), len(os.path.join(root, ""))
    if not paths:
        raise ValueError(_no_images(root))
    parts = [path[prefix:].partition(os.sep) for path in paths]
    return paths, [name for name, _, _ in parts] if all(inside for _, _, inside in parts) else None


def _listed(listing: Path) -> Found:
    """The images of a list file, in its order."""
    with open(listing, "rb") as file:
        if b"\0" in file.read(4096):
            raise ValueError(f"{listing} is no text file; give a list of images, or unpack it and give the folder.")
    lines = listing.read_text("utf-8-sig", "surrogateescape").splitlines()
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
    rows = [_row(listing, number, line) for number, line in numbered if line and not line.startswith("#")]
    if not rows:
        raise ValueError(f"{listing} lists no images; write a line `path` or `path label` for each.")
    names = [name for _, name in rows if name]
    if 0 < len(names) < len(rows):
        raise ValueError(f"{len(names)} of the {len(rows)} images in {listing} have a label; give one to all or none.")
    paths = [os.path.join(listing.parent, path) for path, _ in rows]
    sample = paths[:: -(-len(paths) // 1000)]
    missing = [path for path in sample if not os.path.exists(path)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(sample)} images looked up from {listing} do not exist (for example {missing[0]}); "
            "put them there, or write their paths relative to the folder of the list."
        )
    return paths, names or None


def _row(listing: Path, number: int, line: str) -> tuple[str, str | None]:
    """Path and label: a label is what follows a name that ends like an image's, so paths may have spaces and commas."""
    match = ROW.fullmatch(line)
    if not match:
        raise ValueError(
            f"line {number} of {listing} is not `path` or `path label` with a path that ends in "
            f"{', '.join(EXTENSIONS)}: {line[:80]!r}; correct it."
        )
    return match[1], match[2]


def _split_folder(path: Path, split: str) -> Path:
    """train/ or val/ of an ImageNet folder; one who gave train/ or val/ itself is told so."""
    name = "val" if split == "val" else "train"
    if (path / name).is_dir():
        return path / name
    if (path.absolute().parent / name).is_dir():
        raise ValueError(f"{path} has no folder '{name}', but {path.absolute().parent} has: give --data_folder that.")
    raise ValueError(
        f"{path} has no folder '{name}'; put the images in {path / name}/<class>/<image>, or try --dataset folder, "
        "which takes other layouts."
    )


def _folder_names(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and _wanted(root, entry.name))


def _classes_of(root: Path, classes: list[str]) -> Source:
    found = [(path, name) for name in classes for path in _image_files(root / name)]
    if not found and _image_files(root):
        raise ValueError(
            f"no image in {root} lies in a class folder; put each into {root}/<class>/, or try --dataset folder, "
            "which takes other layouts."
        )
    if not found:
        raise ValueError(_no_images(root))
    paths, names = zip(*found)
    return Source(paths, _labels(names, classes), tuple(classes), *IMAGENET)


def _image_files(root: Path) -> list[str]:
    """Sorted, folder by folder: the same numbering on every machine."""
    found = [path for path in _files(root) if path.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))


def _files(root: Path) -> Iterator[str]:
    """Every file below `root` that is not hidden, behind symbolic links too."""
    for at, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if _wanted(at, name)]
        yield from (os.path.join(at, name) for name in files if not name.startswith("."))


def _wanted(at: str | Path, name: str) -> bool:
    """Not a hidden folder, nor a link to one that holds it, however it was reached: that would go round for ever."""
    path = Path(at, name)
    circle = path.is_symlink() and any(above.resolve().is_relative_to(path.resolve()) for above in path.parents)
    return not (name.startswith(".") or circle)


def _no_images(root: Path) -> str:
    kinds = Counter(os.path.splitext(path)[1] or "other" for path in _files(root))
    most = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:3]
    there = ", ".join(f"{count} {kind} file{'s' * (count > 1)}" for kind, count in most)
    found = f"but {there}" if there else "which is empty"
    return f"no images in {root}, {found}; names of images end in {', '.join(EXTENSIONS)}."
