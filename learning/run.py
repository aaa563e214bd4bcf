"""A run folder: options, environment, log.txt, log.jsonl and TensorBoard. Ranks other than 0 get a silent one."""

import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from learning import checkpoint, lock, parallel
from learning.resume import Found
from learning.tensorboard import cut, scalar_writer
from memory import look

EVENTS = "tensorboard.json"  # the names of this run's event files: others may lie in the same folder


class Run:
    """Writes to `folder` and, as TensorBoard events, to `tb_folder`. A log line is also printed.

    The last `keep` checkpoints stay, and that of every `save_freq`-th epoch. `position` is that of the checkpoint to go
    on from, empty at the beginning: what was written after it is dropped, and will be written again.
    """

    def __init__(self, folder: Path, tb_folder: Path, *, keep: int, save_freq: int, position: dict[str, Any]):
        self.folder, self.keep, self.save_freq = folder, keep, save_freq
        folder.mkdir(parents=True, exist_ok=True)
        self._drop(tb_folder, position)
        self._lines = (folder / "log.jsonl").open("a")
        self._text = (folder / "log.txt").open("a")
        before = set(tb_folder.glob("*"))
        self._scalar, self._flush, note = scalar_writer(tb_folder)
        self._events += sorted(set(tb_folder.glob("*")) - before)
        self.write_json(EVENTS, [path.name for path in self._events])
        if note:
            self.log(note)

    def _drop(self, tb_folder: Path, position: dict[str, Any]) -> None:
        later = [path for step, path in checkpoint.numbered(self.folder, "step").items() if step > position["step"]]
        for path in later:  # damaged, or of another future
            path.rename(path.with_suffix(".dropped"))
        for path in self.folder.glob("*.tmp"):
            path.unlink()
        self._thin_out()
        cut(self.folder / "log.jsonl", position["log_bytes"])
        named = self.folder / EVENTS
        written = [tb_folder / name for name in json.loads(named.read_text())] if named.exists() else []
        for path in written:
            cut(path, position["events"].get(path.name, 0))
        self._events = [path for path in written if path.exists()]

    def log(self, text: str) -> None:
        tqdm.write(text)  # above a progress bar, where there is one
        sys.stdout.flush()
        self._text.write(text + "\n")
        self._text.flush()

    def record(self, kind: str, *, epoch: int, step: int, **values: Any) -> None:
        """One object in log.jsonl, and its numbers as TensorBoard scalars: `name` per epoch, `kind/name` otherwise."""
        self._lines.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in _numbers(values):
            self._scalar(name if kind == "epoch" else f"{kind}/{name}", value, epoch if kind == "epoch" else step)

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        content = text.encode(errors="surrogateescape")  # names of files need not be UTF-8
        checkpoint.write(self.folder / name, lambda file: file.write(content))

    def save(self, state: dict[str, Any], *, epoch: int | None) -> None:
        """Write a checkpoint, at the end of an `epoch` or within one (None)."""
        newest = self.folder / f"step_{state['position']['step']:08}.pth"
        checkpoint.save(newest, state)
        if epoch and self.save_freq and epoch % self.save_freq == 0:
            checkpoint.link(newest, f"ckpt_epoch_{epoch}.pth")
        checkpoint.link(newest, "current.pth")  # last: from here on it counts
        self._thin_out()

    def _thin_out(self) -> None:
        for path in list(checkpoint.numbered(self.folder, "step").values())[: -self.keep]:
            path.unlink()

    def save_apart(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint that is none of those a run goes on from by itself."""
        checkpoint.save(self.folder / name, state)

    def written(self) -> dict[str, Any]:
        """How long the log and the event files are, for a checkpoint to count on: they are on the disk now."""
        self._flush()
        log = self.folder / "log.jsonl"
        for path in (log, self.folder / "log.txt", *self._events[-1:]):  # older event files are no longer written to
            checkpoint.sync(path)
        return {"log_bytes": log.stat().st_size, "events": {path.name: path.stat().st_size for path in self._events}}


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a record, by name: those of a dict as name/key, of lists the quantiles alone, as positive_q05."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif name.endswith("_quantiles"):
            yield from ((f"{name[:-8]}{100 * share:02.0f}", x) for share, x in zip(look.QUANTILES, value))
        elif not isinstance(value, list | str):
            yield name, value


class SilentRun:
    """What the other ranks hold, and a dry run: the same calls, nothing written. `log` hears what there is to say."""

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda text: None):
        self.folder, self.log = folder, log

    def record(self, kind: str, *, epoch: int, step: int, **values: Any) -> None: ...

    def write_json(self, name: str, content: Any) -> None: ...

    def write_text(self, name: str, text: str) -> None: ...

    def save(self, state: dict[str, Any], *, epoch: int | None) -> None: ...

    def save_apart(self, name: str, state: dict[str, Any]) -> None: ...

    def written(self) -> dict[str, Any]:
        return {}


def open_folder(opt: Any, found: Found, position: dict[str, Any], stem: str, size: int) -> Run | SilentRun:
    """The folder of the run that is gone on with, whose checkpoint `found` was written at `position`; else a fresh one.

    Going on from an older checkpoint, or under another --name, leaves the old run as it is. ValueError where nothing
    can be written or checkpoints of `size` bytes have no room.
    """
    folder, start = plan_folder(opt, found, stem, size), {"step": 0, "log_bytes": 0, "events": {}}
    if found.in_place:
        start |= position
    else:
        folder = parallel.on_main(lambda: _make_folder(opt, stem))
    if not parallel.is_main():
        return SilentRun(folder)
    return Run(folder, Path(opt.tb_path) / folder.name, keep=opt.keep, save_freq=opt.save_freq, position=start)


def rehearse_folder(opt: Any, found: Found, position: dict[str, Any], stem: str, size: int) -> SilentRun:
    """For a dry run: what `open_folder` would open, checked as there, but not made. Rank 0 prints."""
    folder = plan_folder(opt, found, stem, size)
    return SilentRun(folder, tqdm.write) if parallel.is_main() else SilentRun(folder)


def plan_folder(opt: Any, found: Found, stem: str, size: int) -> Path:
    """Where a run would write, once it is sure that it can: ValueError otherwise."""

    def plan():
        folder = found.path.parent if found.in_place else _free_folder(opt, stem)
        there = len(checkpoint.numbered(folder, "step"))
        check_places(folder, Path(opt.tb_path), size * max(opt.keep + 1 - there, 1))
        return folder

    return parallel.on_main(plan)


def _free_folder(opt: Any, stem: str) -> Path:
    """`--model_path/--name`, or without a name the first of `stem-1`, `stem-2`, ... that does not exist there.

    ValueError if the named folder already holds a checkpoint: nothing already trained is overwritten.
    """
    root = Path(opt.model_path)
    if opt.name is None:
        numbered = (root / f"{stem}-{number}" for number in itertools.count(1))
        return next(folder for folder in numbered if not folder.exists())
    folder = root / opt.name
    if checkpoint.newest_first(folder):
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
        lock.hold(folder)  # a run of that --name may be on its way to its first checkpoint
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
            f"Only {free / 1e6:.0f} MB are free for {folder}, and checkpoints take {room / 1e6:.0f} MB; make room, "
            "lower --keep or choose another --model_path."
        )


def environment() -> dict[str, Any]:
    """What a number may depend on: versions, machine, threads, command and git revision."""
    return {
        "command": " ".join(sys.argv),
        "git": _revision(),
        "python": platform.python_version(),
        **numerics(),
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def numerics() -> dict[str, Any]:
    """What the last bits of a sum depend on."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
    }


def _revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None
