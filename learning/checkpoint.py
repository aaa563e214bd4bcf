"""One file that holds everything needed to continue or to evaluate. Reading it never runs code."""

import argparse
import contextlib
import os
import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

KEYS = ("method", "optimizer", "scaler", "position", "options")
FORMAT = 1  # of files that do not say as well; a change that this program cannot read raises it
METADATA = "__metadata__"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to a file."""
    write(path, partial(torch.save, {"format": FORMAT} | state))


def write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Let `fill` write a file so that a crash leaves either the old one or the new one, never a torn one.

    OSError, as one sentence, where it cannot be written to its end; nothing half written is left then.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}); what was written before is intact: make "
            "room or see what is wrong there, then go on."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(path: Path, name: str) -> None:
    """Call the file `path` `name` as well, in place of the file that was called so; a crash leaves one of the two."""
    other = path.with_name(name)
    unfinished = path.with_name(f"{name}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(path, unfinished)
    except OSError:  # the file system has no such links
        with path.open("rb") as content:
            write(other, partial(shutil.copyfileobj, content))
    else:
        unfinished.replace(other)
        sync(path.parent)


def numbered(folder: Path, kind: str) -> dict[int, Path]:
    """Number -> path of all `kind`_NUMBER.pth in a folder, ascending."""
    found = ((re.fullmatch(rf"{kind}_(\d+)\.pth", path.name), path) for path in folder.glob("*.pth"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints in a run folder."""
    steps, epochs = (reversed(numbered(folder, kind).values()) for kind in ("step", "ckpt_epoch"))
    return [*folder.glob("current.pth"), *steps, *epochs]


def locate(path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """The file meant by `path`, of a run folder its newest sound checkpoint, and a note where newer ones are damaged.

    ValueError where a folder has none.
    """
    path, damaged = Path(path), []
    if not path.is_dir():
        return path, ()
    for file in newest_first(path):
        if is_sound(file):
            note = f"damaged in {path}: {', '.join(damaged)}; taking the newest sound checkpoint, {file.name}"
            return file, (note,) if damaged else ()
        damaged.append(file.name)
    if damaged:
        raise ValueError(
            f"Every checkpoint in {path} is damaged ({', '.join(damaged)}); put a sound copy there or begin a new run."
        )
    return path / "current.pth", ()


def is_sound(path: Path) -> bool:
    """Whether a file that torch.save wrote is whole: it has a checksum of every part, which torch.load ignores."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is None
    except Exception:  # damage has as many faces as there are bytes
        return False


def is_ours(state: Any) -> bool:
    return isinstance(state, dict) and state.keys() >= set(KEYS)


def load(path: str | Path) -> dict[str, Any]:
    """The dictionary that `save` wrote, on the CPU. ValueError if there is none or it is not one of ours."""
    state = read(path)
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of main_contrast.py: it lacks {', '.join(missing)}.")
    return state


def read(path: str | Path) -> Any:
    """What a file of weights (torch.save or safetensors; of a run folder current.pth) holds, on the CPU.

    Tensors, plain values and argparse.Namespace are read; a pickle that names anything else is refused, with nothing
    it names imported or called. The metadata of a safetensors file come under METADATA. ValueError in one sentence.
    """
    path = Path(path) / "current.pth" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint at {path}; give the path of a current.pth or ckpt_epoch_*.pth file.")
    with path.open("rb") as file:
        start = file.read(9)
    try:
        state = _read_safetensors(path) if start[8:] == b"{" else _read_pickle(path)
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are bytes in it
        raise ValueError(f"{path} {_trouble(path, start, error)}") from error
    if is_ours(state) and not is_sound(path):  # others' files need not have checksums
        raise ValueError(f"{path} is damaged; take another checkpoint, or name the folder of the run instead.")
    if is_ours(state) and state.get("format", FORMAT) > FORMAT:
        raise ValueError(f"{path} was written by a newer version of this program; update it to read that file.")
    return state


def _trouble(path: Path, start: bytes, error: Exception) -> str:
    """Why the file that begins with `start` could not be read, and what to do."""
    if not start:
        return "is empty; copy or download it again."
    if start.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint; download the file that the page links to."
    if "TorchScript" in str(error):
        return "is a TorchScript program; load it with torch.jit.load and save its model.state_dict() with torch.save."
    wanted = _called_by(path, str(error))
    if wanted:
        return (
            f"wants to call {wanted}, which might run any code, and was not read; where you trust it, "
            "load it with PyTorch and save its state dict alone with torch.save(state_dict, ...)."
        )
    return (
        f"cannot be read as a checkpoint of tensors and plain values ({type(error).__name__}); "
        "it may be damaged or cut short, so copy or download it again."
    )


def _read_pickle(path: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about pickle protocols, of no use to whoever reads the file
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()} | {METADATA: file.metadata() or {}}  # noqa: SIM118


def _called_by(path: Path, message: str) -> str:
    """The function or class that kept PyTorch from reading the file, or "" if that was something else."""
    found = re.search(r"GLOBAL ([\w.]*\w)", message)
    return found[1] if found else _first_global(path)


def _first_global(path: Path) -> str:
    """The same for a plain pickle in newer notation, of which PyTorch only says that it cannot be read."""
    strings: list[str] = []
    with path.open("rb") as file, contextlib.suppress(ValueError, MemoryError):  # of what is no pickle
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            strings += [argument] if isinstance(argument, str) else []
    return ""
