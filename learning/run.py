"""A run folder: options, environment, log.txt, log.jsonl and TensorBoard. Ranks other than 0 get a silent one."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision

from learning import parallel
from learning.tensorboard import scalar_writer


class Run:
    """Writes to `folder` and, as TensorBoard events, to `tb_folder`. A log line is also printed."""

    def __init__(self, folder: Path, tb_folder: Path, *, log_bytes: int | None = None):
        """`log_bytes` is where log.jsonl stood at the checkpoint a run goes on from: what came later is dropped."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "log.jsonl").open("a")
        if log_bytes is not None and log_bytes <= self._lines.tell():
            self._lines.truncate(log_bytes)
        self._text = (folder / "log.txt").open("a")
        self._scalar, note = scalar_writer(tb_folder)
        if note:
            self.log(note)

    def log(self, text: str) -> None:
        print(text, flush=True)
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


def open_run(folder: Path, tb_folder: Path, *, log_bytes: int | None = None) -> Run | SilentRun:
    return Run(folder, tb_folder, log_bytes=log_bytes) if parallel.is_main() else SilentRun(folder)


def fresh_folder(root: Path, name: str | None, stem: str) -> Path:
    """`root/name`, or without a name the first free of `root/stem-1`, `root/stem-2`, ...; the same on every rank.

    ValueError if the named folder already holds a checkpoint: nothing already trained is overwritten.
    """
    if name is None:
        taken = [
            int(path.name.removeprefix(f"{stem}-")) for path in root.glob(f"{stem}-[0-9]*") if _numbered(path, stem)
        ]
        name = f"{stem}-{max(taken, default=0) + 1}"
    folder = root / name
    if parallel.is_main() and (folder / "current.pth").exists():
        raise ValueError(f"{folder} already holds a trained run; go on with --resume auto or choose another --name.")
    return Path(parallel.broadcast_object(str(folder)))


def _numbered(path: Path, stem: str) -> bool:
    return path.name.removeprefix(f"{stem}-").isdigit()


def environment() -> dict[str, Any]:
    """What a number may depend on: versions, machine, threads, command and git revision."""
    root = Path(__file__).parents[1]
    git = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join(sys.argv),
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
