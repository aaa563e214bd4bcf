"""One file that holds everything needed to continue or to evaluate. Reading it never runs code."""

import os
from pathlib import Path
from typing import Any

import torch

KEYS = ("method", "optimizer", "scaler", "position", "options")


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
    if not Path(path).is_file():
        raise ValueError(f"There is no checkpoint at {path}; give the path of a current.pth or ckpt_epoch_*.pth file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are bytes in it
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values ({type(error).__name__})."
        ) from error
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of main_contrast.py: it lacks {', '.join(missing)}.")
    return state
