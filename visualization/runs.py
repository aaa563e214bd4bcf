"""Run folders as plain data: what a figure needs of options.json, results.json, log.jsonl and scores/. Only reads."""

import glob
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

# What the figures call a statistic, and its column in the score files. "gap" is computed from two of them.
COLUMNS = {"negative_variance": "negative_var", "negative_mean": "negative_mean", "positive_mean": "positive"}
LONG_NAME = 32


@dataclass(frozen=True, eq=False)
class Run:
    """One training run.

    accuracy: such as "linear 56.2%", "" before any evaluation; log: the objects of log.jsonl; files: epoch -> score
    file, in order; steps: (S,) global 1-based number of every saved step; columns: the arrays every score file has.
    """

    folder: Path
    label: str
    accuracy: str
    options: dict[str, Any]
    log: list[dict[str, Any]]
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
        per_epoch = self.steps[-1] / max(self.files)
        epochs = {
            "end of epoch 1": [1],
            "learning-rate drop": [] if self.options.get("cosine") else self.options.get("lr_decay_epochs", []),
            "transformation starts": [self.options.get("ft_begin_epoch", 0)] if self.transforms else [],
        }
        steps = {name: [epoch * per_epoch for epoch in when] for name, when in epochs.items()}
        return {name: tuple(step for step in when if 0 < step < self.steps[-1]) for name, when in steps.items()}


def find_runs(folder: str | os.PathLike) -> list[Path]:
    """The folders at or under `folder` that hold score files, sorted."""
    return sorted({path.parent.parent for path in Path(folder).rglob("scores/scores_*.npz")})


def read_runs(folders: Sequence[str | os.PathLike], *, labels: Sequence[str] | None = None) -> list[Run]:
    """Open run folders for drawing. Labels default to what tells the folders apart.

    Raises ValueError: a folder is missing, has no score files or a damaged file; too few or too many labels.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if labels is not None and len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} runs: give one label per run")
    return [_read_run(path, label) for path, label in zip(paths, labels or _names(paths))]


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


def _read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}: give the folder that holds the run's log.txt and scores/")
    found = ((re.fullmatch(r"scores_(\d+)\.npz", path.name), path) for path in folder.glob("scores/*"))
    files = dict(sorted((int(match[1]), path) for match, path in found if match))
    contents = [_read_scores(path, "step") for path in files.values()]
    steps = np.concatenate([step for step, _ in contents]) if contents else np.empty(0)
    if not len(steps):
        raise ValueError(f"{folder} has no saved scores: training with --save_score writes them after every epoch")
    columns = frozenset.intersection(*(names for _, names in contents))
    options = _read_json(folder / "options.json").get("values", {})
    accuracy = _accuracy(_results(folder))
    return Run(folder, label, accuracy, options, _read_log(folder / "log.jsonl"), files, steps, columns)


def _read_scores(path: Path, column: str) -> tuple[np.ndarray, frozenset[str]]:
    """One array of a score file, the others stay on disk; and the names of all."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[column], frozenset(arrays.files)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or delete it to draw the other epochs of the run"
        ) from error


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
    """What evaluations found out about this run's encoder. Each has a folder beside it, called RUN_linear-1, say."""
    found = [_read_json(path) for path in sorted(folder.parent.glob(f"{glob.escape(folder.name)}_*/results.json"))]
    about_us = [r for r in found if not r["use_ema"] and Path(r["ckpt"] or "").parent.name == folder.name]
    return {name: value for results in about_us for name, value in results.items()}


def _accuracy(results: dict[str, Any]) -> str:
    """Top-1 of the linear probe after its last epoch, else of k-NN on backbone features, else nothing."""
    for name, evaluation, part in (("linear", "linear", "last"), ("k-NN", "knn", "backbone")):
        top1 = results.get(evaluation, {}).get(part, {}).get("top1")
        if top1 is not None:
            return f"{name} {top1:.1f}%"
    return ""
