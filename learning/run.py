"""A run folder: options, environment, log.txt, log.jsonl and TensorBoard. Ranks other than 0 get a silent one."""

import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from learning import parallel
from learning.tensorboard import scalar_writer


class Run:
    """Writes to `folder` and, as TensorBoard events, to `tb_folder`. A log line is also printed."""

    def __init__(self, folder: Path, tb_folder: Path, *, log_bytes: int = 0):
        """`log_bytes` is how much of log.jsonl to keep: what came after the checkpoint to go on from is dropped."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "log.jsonl").open("a")
        self._lines.truncate(min(log_bytes, self._lines.tell()))
        self._text = (folder / "log.txt").open("a")
        self._scalar, note = scalar_writer(tb_folder)
        if note:
            self.log(note)

    def log(self, text: str) -> None:
        tqdm.write(text)  # above a progress bar, where there is one
        sys.stdout.flush()
        self._text.write(text + "\n")
        self._text.flush()

    def record(self, kind: str, *, epoch: int, step: int, **values: float) -> None:
        """One object in log.jsonl, one TensorBoard scalar per value: tag `name` per epoch, `kind/name` otherwise."""
        self._lines.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._scalar(name if kind == "epoch" else f"{kind}/{name}", value, epoch if kind == "epoch" else step)

    def write_json(self, name: str, content: Any) -> None:
        partial = self.folder / f"{name}.tmp"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(self.folder / name)

    def log_bytes(self) -> int:
        """Length of log.jsonl, for the checkpoint."""
        return os.path.getsize(self.folder / "log.jsonl")


class SilentRun:
    """What the other ranks hold: the same calls, nothing written."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, text: str) -> None: ...

    def record(self, kind: str, *, epoch: int, step: int, **values: float) -> None: ...

    def write_json(self, name: str, content: Any) -> None: ...

    def log_bytes(self) -> int:
        return 0


def open_run(folder: Path, tb_folder: Path, *, log_bytes: int = 0) -> Run | SilentRun:
    return Run(folder, tb_folder, log_bytes=log_bytes) if parallel.is_main() else SilentRun(folder)


def open_folder(opt: Any, found: Path | None, state: dict[str, Any] | None, stem: str) -> Run | SilentRun:
    """The folder of the run whose newest checkpoint, `found` holding `state`, is gone on from; else a fresh one.

    Going on from an older checkpoint, or under another --name, leaves the old run as it is.
    """
    if found and found.name == "current.pth" and opt.name in (None, found.parent.name):
        folder, kept = found.parent, state["position"]["log_bytes"]
    else:
        folder, kept = parallel.on_main(lambda: fresh_folder(Path(opt.model_path), opt.name, stem)), 0
    return open_run(folder, Path(opt.tb_path) / folder.name, log_bytes=kept)


def fresh_folder(root: Path, name: str | None, stem: str) -> Path:
    """`root/name`, or without a name the next of `root/stem-1`, `root/stem-2`, ...

    ValueError if the named folder already holds a checkpoint: nothing already trained is overwritten.
    """
    if name is not None:
        folder = root / name
        if (folder / "current.pth").exists():
            raise ValueError(
                f"{folder} already holds a trained run; go on with it by --resume {folder} or choose another --name."
            )
        return folder
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        try:
            (root / f"{stem}-{number}").mkdir()
        except FileExistsError:  # taken, perhaps a moment ago by another run
            continue
        return root / f"{stem}-{number}"


def environment() -> dict[str, Any]:
    """What a number may depend on: versions, machine, threads, command and git revision."""
    return {
        "command": " ".join(sys.argv),
        "git": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None
