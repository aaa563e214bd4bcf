"""One file that holds everything needed to continue or to evaluate. Reading it never runs code."""

import argparse
import os
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch

KEYS = ("method", "optimizer", "scaler", "position", "options")
METADATA = "__metadata__"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that a crash leaves either the old file or the new one, never a torn one."""
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | Path) -> dict[str, Any]:
    """The dictionary that `save` wrote, on the CPU. ValueError if there is none or it is not one of ours."""
    state = read(path)
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of main_contrast.py: it lacks {', '.join(missing)}.")
    return state


def read(path: str | Path) -> Any:
    """What a file of weights (torch.save or safetensors; a run folder: its newest checkpoint) holds, on the CPU.

    Tensors, plain values and argparse.Namespace are read; a pickle that names anything else is refused, with nothing
    it names imported or called. The metadata of a safetensors file come under METADATA. ValueError in one sentence.
    """
    path = Path(path) / "current.pth" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint at {path}; give the path of a current.pth or ckpt_epoch_*.pth file.")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty; copy or download it again.")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a checkpoint; download the file that the page links to.")
    try:
        return _read_safetensors(path) if start[8:] == b"{" else _read_pickle(path)
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are bytes in it
        wanted = _called_by(path, str(error))
        if wanted:
            raise ValueError(
                f"{path} wants to call {wanted}, which might run any code, and was not read; where you trust it, "
                "load it with PyTorch and save its state dict alone with torch.save(state_dict, ...)."
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values ({type(error).__name__}); "
            "it may be damaged or cut short, so copy or download it again."
        ) from error


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
    try:
        for operation, argument, _ in pickletools.genops(path.read_bytes()):
            if operation.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            strings += [argument] if isinstance(argument, str) else []
    except ValueError:  # not a pickle
        pass
    return ""
