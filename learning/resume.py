"""Finding the checkpoint to go on from, and agreeing with it."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from learning import checkpoint, lock

Options = TypeVar("Options")

# Options that say where a run writes, when it shows something and on what it runs, not what it computes.
HOUSEKEEPING = frozenset(
    # fmt: off
    {
        "resume",
        "name",
        "model_path",
        "tb_path",
        "exp_iter",
        "print_freq",
        "save_freq",
        "save_every_steps",
        "keep",
        "knn_freq",
        "grad_norms",
        "stop_epoch",
        "dry_run",
        "num_workers",
        "keep_memory",
        "device",
        "gpu",
        "nprocs",
        "world_size",
        "node_rank",
        "dist_url",
        "dist_backend",
        "multiprocessing_distributed",
    }
    # fmt: on
)
# Those of a run, kept when it is resumed, and those of a start: what was typed then says nothing about now.
HABITS = {"print_freq", "save_freq", "save_every_steps", "keep", "knn_freq", "grad_norms", "num_workers", "tb_path"}
MOMENTARY = HOUSEKEEPING - HABITS
# Options a checkpoint's tensors depend on, those first that decide about others.
SHAPE = (
    "method",
    "mem",
    "modal",
    "view",
    "jigsaw",
    "loss",
    "optimizer",
    "decay_all",
    "arch",
    "width",
    "stem",
    "head",
    "feat_dim",
    "queue_size",
    "prototypes",
    "dataset",
    "batch_size",
    "pre_scores",
)
TYPED = ("command line", "published", "implied")  # how the sources of what a user asked for begin
AUTOMATIC = (None, "auto")


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, if any: `in_place` in the run folder it lies in, else in a new one."""

    path: Path | None = None
    in_place: bool = False
    notes: tuple[str, ...] = ()


def find(opt: Any) -> Found:
    """What `opt.resume` asks for: a checkpoint, a run's newest sound one, or (auto) that of the newest equal run.

    A run to be gone on with is held (`lock`) before it is looked at: ValueError if another process writes to it, or
    if a run has no sound checkpoint. With auto there may be no run.
    """
    if not opt.resume:
        return Found()
    if opt.resume != "auto":
        return _take(Path(opt.resume), opt)
    places = Path(opt.model_path).glob("*/options.json")
    runs = [path.parent for path in places if opt.name in (None, path.parent.name) and _equal(path.parent, opt)]
    runs = [run for run in runs if opt.name or os.access(run, os.W_OK)]  # those of others are not to be gone on with
    for run in runs:  # not only the newest: one that has no checkpoint yet may be running
        lock.hold(run)
    begun, damaged = filter(checkpoint.newest_first, runs), []
    for run in sorted(begun, key=_written, reverse=True):
        try:
            found = _take(run, opt)
            return dataclasses.replace(found, notes=(*damaged, *found.notes))
        except ValueError as error:
            if opt.name:
                raise
            damaged.append(str(error))
    return Found(notes=(*damaged, f"no run below {opt.model_path} has these options: starting anew"))


def _take(path: Path, opt: Any) -> Found:
    run = path if path.is_dir() else path.parent
    in_place = (path == run or path.name == "current.pth") and opt.name in (None, run.name)
    if in_place and checkpoint.newest_first(run):
        lock.hold(run)
    path, notes = checkpoint.locate(path)
    return Found(path, in_place, notes)


def _written(run: Path) -> float:
    return max(path.stat().st_mtime for path in checkpoint.newest_first(run))


def _equal(folder: Path, opt: Any) -> bool:
    """Whether the run in `folder` has the options `opt`, automatic ones aside. Those it does not know are defaults."""
    try:
        stored = json.loads((folder / "options.json").read_text())["values"]
    except (OSError, ValueError, KeyError):
        return False
    stored = {field.name: field.default for field in dataclasses.fields(opt)} | stored
    ours = json.loads(json.dumps(dataclasses.asdict(opt)))
    return all(stored[k] == v for k, v in ours.items() if k not in HOUSEKEEPING and v not in AUTOMATIC)


def adopt(opt: Options, origins: dict[str, str], stored: dict[str, Any]) -> tuple[Options, dict[str, str], list[str]]:
    """Options for going on from a checkpoint written under `stored`; the sources of those taken over; and notes.

    Whatever the user did not ask for is the checkpoint's. Tensors must fit, so a contradicting shape is refused;
    anything else may be changed on purpose and is noted.
    """
    if "eval" in stored and not hasattr(opt, "eval"):
        raise ValueError("The checkpoint is one of main_linear.py, which goes on with it: give that of a pre-training.")
    # What older checkpoints do not mention was so.
    stored = {"decay_all": stored.get("optimizer") != "lars", "sync_bn": False} | stored
    taken, notes, rank = {}, [], {name: place for place, name in enumerate(SHAPE)}
    for name, value in sorted(dataclasses.asdict(opt).items(), key=lambda item: rank.get(item[0], len(rank))):
        if name in MOMENTARY or name not in stored:
            continue
        before = tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
        asked = origins[name].startswith(TYPED)
        if asked and before == value:
            continue
        if not asked or value in AUTOMATIC:
            taken[name] = before
        elif name in SHAPE:
            raise ValueError(
                f"--{name} {value} contradicts the checkpoint, which has {before}; resume with its own options."
            )
        elif name not in HOUSEKEEPING:
            notes.append(f"Going on with --{name} {value}; the checkpoint was trained with {before}.")
    return dataclasses.replace(opt, **taken), dict.fromkeys(taken, "checkpoint"), notes
