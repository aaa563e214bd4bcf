"""Finding the checkpoint to go on from, and agreeing with it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from learning import checkpoint

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
        "knn_freq",
        "stop_epoch",
        "dry_run",
        "num_workers",
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


def find(opt: Any) -> Path | None:
    """The checkpoint that `opt.resume` asks for: '' none, a path that one, 'auto' the newest of an equal run if any."""
    if not opt.resume:
        return None
    if opt.resume != "auto":
        return checkpoint.locate(opt.resume)
    runs = sorted(Path(opt.model_path).glob("*/current.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in runs if opt.name in (None, path.parent.name) and _equal(path.parent, opt)), None)


def _equal(folder: Path, opt: Any) -> bool:
    """Whether the run in `folder` has the options `opt`, automatic ones aside."""
    try:
        stored = json.loads((folder / "options.json").read_text())["values"]
    except (OSError, ValueError, KeyError):
        return False
    ours = json.loads(json.dumps(dataclasses.asdict(opt)))
    return all(stored.get(k) == v for k, v in ours.items() if k not in HOUSEKEEPING and v not in AUTOMATIC)


def adopt(opt: Options, origins: dict[str, str], stored: dict[str, Any]) -> tuple[Options, dict[str, str], list[str]]:
    """Options for going on from a checkpoint written under `stored`; the sources of those taken over; and notes.

    Whatever the user did not ask for is the checkpoint's. Tensors must fit, so a contradicting shape is refused;
    anything else may be changed on purpose and is noted.
    """
    # What older checkpoints do not mention was so.
    stored = {"decay_all": stored.get("optimizer") != "lars", "sync_bn": False} | stored
    taken, notes, rank = {}, [], {name: place for place, name in enumerate(SHAPE)}
    for name, value in sorted(dataclasses.asdict(opt).items(), key=lambda item: rank.get(item[0], len(rank))):
        before = tuple(stored[name]) if isinstance(stored.get(name), list) else stored.get(name, value)
        if name in HOUSEKEEPING or before == value:
            continue
        if value in AUTOMATIC or not origins[name].startswith(TYPED):
            taken[name] = before
        elif name in SHAPE:
            raise ValueError(
                f"--{name} {value} contradicts the checkpoint, which has {before}; resume with its own options."
            )
        else:
            notes.append(f"Going on with --{name} {value}; the checkpoint was trained with {before}.")
    return dataclasses.replace(opt, **taken), dict.fromkeys(taken, "checkpoint"), notes
