"""Score statistics: what the positives and negatives of every query looked like at every step, and their files."""

import math
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMNS = (
    "positive",
    "negative_mean",
    "negative_var",
    "negative_max",
    "negative_logmeanexp",
    "positive_logit",
)


class Scored(NamedTuple):
    """Of the scores s of each query's negatives, (N,) each: log sum exp(s / temperature), mean, unbiased variance and
    maximum; and the logarithm of how many there are, a number if of all queries as many.
    """

    log_sum_exp: Tensor
    mean: Tensor
    variance: Tensor
    maximum: Tensor
    log_count: Tensor | float

    @staticmethod
    def of(negative: Tensor, temperature: float, valid: Tensor | None = None) -> "Scored":
        """From scores (N, K), -inf where `valid` (N, K) is False and one does not count; None if all do."""
        log_sum_exp = torch.logsumexp(negative / temperature, dim=1)
        with torch.no_grad():
            mean, variance, log_count = _moments(negative, valid)
            return Scored(log_sum_exp, mean, variance, negative.amax(1), log_count)


def _moments(negative: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Mean and variance of each row, and the logarithm of how many scores it has."""
    if valid is None:
        variance, mean = torch.var_mean(negative, dim=1)
        return mean, variance, math.log(negative.shape[1])
    count = valid.sum(1)
    mean = negative.where(valid, 0).sum(1) / count
    variance = (negative - mean[:, None]).where(valid, 0).square().sum(1) / (count - 1).clamp(min=1)
    return mean, variance, count.log()


@torch.no_grad()
def statistics(positive: Tensor, scored: Scored | None, temperature: float) -> Tensor:
    """One row of `COLUMNS` per query, (N, 6) float32; without negatives (None) only the first column.

    positive: (N,) scores. exp(negative_logmeanexp) and exp(positive_logit) are the mean exp(neg / T) and exp(pos / T)
    of the published score files, in a form that cannot overflow.
    """
    if scored is None:
        return positive.detach().float()[:, None]
    log_mean_exp = scored.log_sum_exp - scored.log_count
    columns = [positive, scored.mean, scored.variance, scored.maximum, log_mean_exp, positive / temperature]
    return torch.stack([column.detach().float() for column in columns], 1)


def columns(width: int) -> tuple[str, ...]:
    """The names of rows of this width: 6, or 1 without negatives; twice that with the scores before transformation."""
    names = COLUMNS if width >= len(COLUMNS) else COLUMNS[:1]
    return names if width == len(names) else names + tuple(f"before_{name}" for name in names)


def summary(rows: Tensor) -> dict[str, Tensor]:
    """Scalars of a batch from its rows (N, C) of any width that `columns` knows, on the device.

    `contrast_acc` is the share of queries whose positive scores at least as high as every negative. Means of squares
    instead of variances: they may be averaged over steps and processes.
    """
    found = dict(zip(columns(rows.shape[1]), rows.unbind(1)))
    values = {}
    for prefix in ("", "before_"):
        if f"{prefix}positive" in found:
            positive = found[f"{prefix}positive"]
            values[f"{prefix}positive_mean"] = positive.mean()
            values[f"{prefix}positive_square"] = positive.square().mean()
        if f"{prefix}negative_mean" in found:
            values[f"{prefix}negative_mean"] = found[f"{prefix}negative_mean"].mean()
            values[f"{prefix}negative_var"] = found[f"{prefix}negative_var"].mean()
            values[f"{prefix}negative_max"] = found[f"{prefix}negative_max"].mean()
            values[f"{prefix}contrast_acc"] = (positive >= found[f"{prefix}negative_max"]).float().mean()
    return values


def spread(features: Tensor) -> Tensor:
    """Mean standard deviation of the dimensions of unit vectors (N, D): 1 / sqrt(D) where they spread, 0 where they
    have collapsed.
    """
    return features.detach().std(0).mean()


def derived(values: dict[str, float]) -> dict[str, float]:
    """Averages of `summary` as they are shown: variances in place of squares, and the gap between the two means."""
    shown = {}
    for name, value in values.items():
        prefix = name.removesuffix("positive_square")
        if prefix == name:
            shown[name] = value
        else:
            shown[f"{prefix}positive_var"] = max(value - values[f"{prefix}positive_mean"] ** 2, 0.0)
            if f"{prefix}negative_mean" in values:
                shown[f"{prefix}gap"] = values[f"{prefix}positive_mean"] - values[f"{prefix}negative_mean"]
    return shown


def write_file(file: BinaryIO, rows: np.ndarray, *, index: np.ndarray, step: np.ndarray, **scalars: float) -> None:
    """Save one epoch: rows (S, B, C) as named float32 columns (S, B), sample index (S, B), global step (S,), scalars.

    What the C columns are, `columns` tells. Plain arrays: `np.load` needs no pickle. Equal arrays make equal bytes.
    """
    named = {name: rows[..., i] for i, name in enumerate(columns(rows.shape[-1]))}
    np.savez(file, step=step, index=index, **named, **scalars)
