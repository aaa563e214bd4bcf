"""Finding the checkpoint to go on from, and agreeing with it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

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
# Options a checkpoint's tensors depend on.
SHAPE = ("arch", "width", "stem", "head", "feat_dim", "queue_size", "dataset", "batch_size")


def find(opt: Any, typed: set[str]) -> Path | None:
    """The checkpoint that `opt.resume` asks for: '' none, a path that one, 'auto' the newest of an equal run if any."""
    if not opt.resume:
        return None
    if opt.resume != "auto":
        path = Path(opt.resume)
        return path / "current.pth" if path.is_dir() else path
    runs = sorted(Path(opt.model_path).glob("*/current.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next(
        (path for path in runs if opt.name in (None, path.parent.name) and _equal(path.parent, opt, typed)), None
    )


def _equal(folder: Path, opt: Any, typed: set[str]) -> bool:
    try:
        stored = json.loads((folder / "options.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    ours = json.loads(json.dumps(dataclasses.asdict(opt)))
    automatic = {name for name, why in stored["sources"].items() if why.startswith("auto")} - typed
    return all(stored["values"].get(name) == ours[name] for name in ours.keys() - HOUSEKEEPING - automatic)


def adopt(opt: Options, stored: dict[str, Any], typed: set[str]) -> tuple[Options, list[str]]:
    """Options for going on from a checkpoint written under `stored`, and notes on what differs.

    What was chosen automatically (an option that is None or "auto") is taken over; tensors must fit, so a contradicting
    shape is refused; anything else may be changed on purpose and is noted.
    """
    taken, notes = {}, []
    for name, value in dataclasses.asdict(opt).items():
        before = tuple(stored[name]) if isinstance(stored.get(name), list) else stored.get(name, value)
        if name in HOUSEKEEPING or before == value:
            continue
        if name not in typed and value in (None, "auto"):
            taken[name] = before
        elif name in SHAPE:
            raise ValueError(
                f"--{name} {value} contradicts the checkpoint, which has {before}; resume with its own options."
            )
        else:
            notes.append(f"Going on with --{name} {value}; the checkpoint was trained with {before}.")
    return dataclasses.replace(opt, **taken), notes
