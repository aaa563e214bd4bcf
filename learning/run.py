"""A run folder: options, environment, log.txt, log.jsonl and TensorBoard. Ranks other than 0 get a silent one."""

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from learning import checkpoint, parallel
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
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        content = text.encode(errors="surrogateescape")  # names of files need not be UTF-8
        checkpoint.write(self.folder / name, lambda file: file.write(content))

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.folder / name, state)

    def log_bytes(self) -> int:
        """Length of log.jsonl, for the checkpoint."""
        return os.path.getsize(self.folder / "log.jsonl")


class SilentRun:
    """What the other ranks hold, and a dry run: the same calls, nothing written. `log` hears what there is to say."""

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda text: None):
        self.folder, self.log = folder, log

    def record(self, kind: str, *, epoch: int, step: int, **values: float) -> None: ...

    def write_json(self, name: str, content: Any) -> None: ...

    def write_text(self, name: str, text: str) -> None: ...

    def save(self, name: str, state: dict[str, Any]) -> None: ...

    def log_bytes(self) -> int:
        return 0


def open_run(folder: Path, tb_folder: Path, *, log_bytes: int = 0) -> Run | SilentRun:
    return Run(folder, tb_folder, log_bytes=log_bytes) if parallel.is_main() else SilentRun(folder)


def open_folder(opt: Any, found: Path | None, state: dict[str, Any] | None, stem: str, room: int) -> Run | SilentRun:
    """The folder of the run whose newest checkpoint, `found` holding `state`, is gone on from; else a fresh one.

    Going on from an older checkpoint, or under another --name, leaves the old run as it is. ValueError where nothing
    can be written or less than `room` bytes are free.
    """
    folder = plan_folder(opt, found, stem, room)
    if _goes_on(opt, found):
        kept = state["position"]["log_bytes"]
    else:
        folder, kept = parallel.on_main(lambda: _make_folder(opt, stem)), 0
    return open_run(folder, Path(opt.tb_path) / folder.name, log_bytes=kept)


def rehearse_folder(opt: Any, found: Path | None, state: dict[str, Any] | None, stem: str, room: int) -> SilentRun:
    """For a dry run: what `open_folder` would open, checked as there, but not made. Rank 0 prints."""
    folder = plan_folder(opt, found, stem, room)
    return SilentRun(folder, tqdm.write) if parallel.is_main() else SilentRun(folder)


def plan_folder(opt: Any, found: Path | None, stem: str, room: int) -> Path:
    """Where a run would write, once it is sure that it can: ValueError otherwise."""

    def plan():
        folder = found.parent if _goes_on(opt, found) else _free_folder(opt, stem)
        check_places(folder, Path(opt.tb_path), room)
        return folder

    return parallel.on_main(plan)


def _goes_on(opt: Any, found: Path | None) -> bool:
    return found is not None and found.name == "current.pth" and opt.name in (None, found.parent.name)


def _free_folder(opt: Any, stem: str) -> Path:
    """`--model_path/--name`, or without a name the first of `stem-1`, `stem-2`, ... that does not exist there.

    ValueError if the named folder already holds a checkpoint: nothing already trained is overwritten.
    """
    root = Path(opt.model_path)
    if opt.name is None:
        numbered = (root / f"{stem}-{number}" for number in itertools.count(1))
        return next(folder for folder in numbered if not folder.exists())
    folder = root / opt.name
    if (folder / "current.pth").exists():
        raise ValueError(
            f"{folder} already holds a trained run; go on with it by --resume {folder} or choose another --name."
        )
    return folder


def _make_folder(opt: Any, stem: str) -> Path:
    Path(opt.model_path).mkdir(parents=True, exist_ok=True)
    while True:
        folder = _free_folder(opt, stem)
        try:
            folder.mkdir(exist_ok=opt.name is not None)
        except FileExistsError:  # taken a moment ago by another run
            continue
        return folder


def check_places(folder: Path, tb_folder: Path, room: int) -> None:
    """ValueError unless both places can be written to and the first has `room` bytes. Tries it, and leaves no trace."""
    for flag, place in (("--tb_path", tb_folder), ("--model_path", folder)):
        try:
            existing = next(path for path in (place, *place.parents) if path.exists())
            with tempfile.TemporaryDirectory(dir=existing):  # permissions alone do not tell, for root in particular
                free = shutil.disk_usage(existing).free
        except OSError as error:
            raise ValueError(f"{place} cannot be written to ({error.strerror}); choose another {flag}.") from error
    if free < room:
        raise ValueError(
            f"Only {free / 1e6:.0f} MB are free for {folder}, and a new checkpoint beside the old one takes "
            f"{room / 1e6:.0f} MB; make room or choose another --model_path."
        )


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
