"""Run folders as plain data: what a figure needs of options.json, results.json, log.jsonl and scores/. Only reads."""

import glob
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

# What the figures call a statistic, and its column in the score files. "gap" is computed from two of them.
COLUMNS = {"negative_variance": "negative_var", "negative_mean": "negative_mean", "positive_mean": "positive"}
# Columns of the published program's files score_001.npy, (steps, batch, 5), under our names.
REFERENCE = ("negative_mean", "negative_var", "positive", "negative_logmeanexp", "positive_logit")
LONG_NAME = 32


@dataclass(frozen=True, eq=False)
class Run:
    """One training run.

    accuracy: such as "linear 56.2%", "" before any evaluation; options, origins: values and where they came from; log:
    the objects of log.jsonl; results: what evaluations of its encoder found, by their names; files: epoch -> score
    file, in order; steps: (S,) global 1-based number of every saved step; columns: the arrays every score file has.
    """

    folder: Path
    label: str
    accuracy: str
    options: dict[str, Any]
    origins: dict[str, str]
    log: list[dict[str, Any]]
    results: dict[str, Any]
    files: dict[int, Path]
    steps: np.ndarray
    columns: frozenset[str]
    _curves: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def legend(self) -> str:
        return f"{self.label}  |  {self.accuracy}" if self.accuracy else self.label

    @property
    def transforms(self) -> bool:
        """Whether feature transformation rewrites scores at any time; without options.json it is taken to."""
        return any(self.options.get(flag) != "none" for flag in ("ft_pos", "ft_neg"))

    @property
    def shows_before(self) -> bool:
        """Whether scores before the transformation were recorded beside those after it."""
        return self.transforms and any(name.startswith("before_") for name in self.columns)

    def curve(self, statistic: str, *, before: bool = False) -> np.ndarray | None:
        """(S,) batch mean of `statistic` at every step; None where the run did not record it.

        statistic: a key of `COLUMNS`, or "gap", positive minus negative mean. before: of the scores before feature
        transformation; a run that transforms nothing has the same scores before and after.
        """
        if statistic == "gap":
            positive, negative = (self.curve(name, before=before) for name in ("positive_mean", "negative_mean"))
            return None if positive is None or negative is None else positive - negative
        column = f"before_{COLUMNS[statistic]}"
        if not before or (column not in self.columns and not self.transforms):
            column = COLUMNS[statistic]
        if column not in self.columns:
            return None
        if column not in self._curves:  # one column of one epoch at a time: a long run has gigabytes of scores
            self._curves[column] = np.concatenate([_batch_means(path, column) for path in self.files.values()])
        return self._curves[column]

    def scores(self, epoch: int, column: str) -> np.ndarray:
        """A column of an epoch's score file, (steps, batch); "step" (steps,)."""
        return _read_scores(self.files[epoch], column)[0]

    def logged(self, kind: str, value: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of every log record of `kind` that holds `value`; both (R,)."""
        records = [record for record in self.log if record.get("kind") == kind and value in record]
        return np.array([r["step"] for r in records], float), np.array([r[value] for r in records], float)

    def marks(self) -> dict[str, tuple[float, ...]]:
        """Name -> steps at which epoch 1 ended, the learning rate dropped, FT started, as far as the run got."""
        last, epoch = self._reached()
        epochs = {
            "end of epoch 1": [1],
            "learning-rate drop": [] if self.options.get("cosine") else self.options.get("lr_decay_epochs", []),
            "transformation starts": [self.options.get("ft_begin_epoch", 0)] if self.transforms else [],
        }
        steps = {name: [one * last / epoch for one in when] for name, when in epochs.items()}
        return {name: tuple(step for step in when if 0 < step < last) for name, when in steps.items()}

    def _reached(self) -> tuple[float, int]:
        """The last step of the last complete epoch, and that epoch; no step where none is."""
        if self.files:
            return self.steps[-1], max(self.files)
        complete = [(record["step"], record["epoch"]) for record in self.log if record.get("kind") == "epoch"]
        return max(complete, default=(0, 1))


def find_runs(folder: str | os.PathLike) -> list[Path]:
    """The folders at or under `folder` that hold score files, sorted."""
    return sorted({path.parent.parent for path in Path(folder).rglob("scores/scores_*.npz")})


def read_runs(
    folders: Sequence[str | os.PathLike], *, labels: Sequence[str] | None = None, log_only: bool = False
) -> list[Run]:
    """Open run folders for drawing. Labels default to what tells the folders apart; `log_only` does without score files
    where there is a log. A folder of the reference's score files (`score_001.npy`) is a run without options and log.

    Raises ValueError: a folder is missing, has no score files or a damaged file; too few or too many labels.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if labels is not None and len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} runs: give one label per run")
    return [_read_run(path, label, log_only) for path, label in zip(paths, labels or _names(paths))]


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names (with as much of the path as tells them apart); of long ones, the `_` pieces not shared by all."""
    if not paths:
        return []
    root = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(root).as_posix() for path in paths]
    if len(names) > 1 and max(map(len, names)) > LONG_NAME:
        shared = set.intersection(*(set(name.split("_")) for name in names))
        names = ["_".join(p for p in name.split("_") if p not in shared) or name for name in names]
    return [fill(name.replace("_", "_ "), LONG_NAME).replace("_ ", "_") for name in names]


def _read_run(folder: Path, label: str, log_only: bool) -> Run:
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}: give the folder that holds the run's log.txt and scores/")
    paths = chain(folder.glob("scores/*"), folder.glob("score_*.npy"))
    found = ((re.fullmatch(r"scores?_(\d+)\.np[yz]", path.name), path) for path in paths)
    files = dict(sorted((int(match[1]), path) for match, path in found if match))
    contents = [_read_scores(path, "step") for path in files.values()]
    steps = np.concatenate([step for step, _ in contents]) if contents else np.empty(0)
    log = _read_log(folder / "log.jsonl")
    if not len(steps) and not (folder / "log.jsonl").exists():
        raise ValueError(f"{folder} is no run: it holds neither log.jsonl nor scores; name one, such as save/NAME")
    if not len(steps) and not (log_only and log):
        raise ValueError(f"{folder} has no saved scores: training with --save_score writes them after every epoch")
    columns = frozenset.intersection(*(names for _, names in contents)) if contents else frozenset()
    options, results = _read_json(folder / "options.json"), _results(folder)
    chosen, origins = options.get("values", {}), options.get("sources", {})
    if "eval" in chosen:
        raise ValueError(f"{folder} is an evaluation: name the run that it is of, and its results are shown, too")
    return Run(folder, label, _accuracy(results), chosen, origins, log, results, files, steps, columns)


def _read_scores(path: Path, column: str) -> tuple[np.ndarray, frozenset[str]]:
    """One array of a score file, the others stay on disk; and the names of all."""
    read, advice = FORMATS[path.suffix]
    try:
        return read(path, column)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error


def _read_ours(path: Path, column: str) -> tuple[np.ndarray, frozenset[str]]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[column], frozenset(arrays.files)


def _read_reference(path: Path, column: str) -> tuple[np.ndarray, frozenset[str]]:
    """Its exponentials become logarithms, as in our files; epochs are taken to be equally long, as nothing tells."""
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.ndim != 3 or rows.shape[2] != len(REFERENCE):
        raise ValueError(f"its shape is {rows.shape}, not steps x batch x {len(REFERENCE)}")
    if column == "step":
        return (int(path.stem.split("_")[1]) - 1) * len(rows) + 1 + np.arange(len(rows)), frozenset(REFERENCE)
    place = REFERENCE.index(column)
    values = rows[..., place].astype(np.float64)
    return np.log(values) if place >= 3 else values, frozenset(REFERENCE)


FORMATS = {
    ".npz": (_read_ours, "restore it, or delete it to draw the other epochs of the run"),
    ".npy": (_read_reference, "only plain numbers are read, so save its whole batches as an array (steps, batch, 5)"),
}


def _batch_means(path: Path, column: str) -> np.ndarray:
    return _read_scores(path, column)[0].mean(axis=1, dtype=np.float64)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or delete it to draw the run without") from error


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Every complete line; the last one of a run that is being written, or was killed, may be half a line."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _results(folder: Path) -> dict[str, Any]:
    """What evaluations found out about this run's encoder: of each kind the last, by the number of its folder, which
    lies beside the run and is called RUN_linear-1, say.
    """
    paths = folder.parent.glob(f"{glob.escape(folder.name)}_*/results.json")
    found = [_read_json(path) for path in sorted(paths, key=lambda path: _numbered(path.parent.name))]
    about_us = [r for r in found if not r["use_ema"] and Path(r["ckpt"] or "").parent.name == folder.name]
    return {name: value for results in about_us for name, value in results.items()}


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def _accuracy(results: dict[str, Any]) -> str:
    """Top-1 of the linear probe after its last epoch, else of k-NN on backbone features, else nothing."""
    for name, evaluation, part in (("linear", "linear", "last"), ("k-NN", "knn", "backbone")):
        top1 = results.get(evaluation, {}).get(part, {}).get("top1")
        if top1 is not None:
            return f"{name} {top1:.1f}%"
    return ""


PLACE = ("name", "resume", "model_path", "tb_path")  # where a run lies, not what it is


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options in which the runs that know them differ, and their values in every run; None where one does not."""
    names = dict.fromkeys(name for run in runs for name in run.options if name not in PLACE)
    known = {name: [run.options[name] for run in runs if name in run.options] for name in names}
    differ = [name for name, values in known.items() if any(value != values[0] for value in values)]
    return {name: [run.options.get(name) for run in runs] for name in differ}


def chosen(run: Run) -> dict[str, list[Any]]:
    """The options that are not the default, as `differing` has them."""
    names = [name for name, origin in run.origins.items() if origin != "default" and name not in PLACE]
    return {name: [run.options[name]] for name in names}


def measures(run: Run) -> dict[str, float]:
    """Name -> number: top-1 of evaluations, then k-NN while training, averages of the last epoch, the last geometry."""
    found = {
        f"{kind}, {part}": values["top1"]
        for kind, parts in run.results.items()
        if isinstance(parts, dict)
        for part, values in parts.items()
        if isinstance(values, dict)
    }
    for part in ("backbone", "head"):
        _, top1 = run.logged("knn", f"{part}_top1")
        if len(top1):
            found |= {f"knn while training, {part}, last": top1[-1], f"knn while training, {part}, best": top1.max()}
    for kind in ("epoch", "scores"):
        last = next((record for record in reversed(run.log) if record.get("kind") == kind), {})
        found |= {name: x for name, x in last.items() if isinstance(x, (int, float)) and name not in ("epoch", "step")}
    _, speed = run.logged("step", "images_per_second")
    return found | ({"images_per_second": float(np.median(speed))} if len(speed) else {})
