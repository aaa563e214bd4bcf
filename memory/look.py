"""What a log line shows of one step: how its scores are distributed, and how its embeddings lie on the sphere."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 64
OUTSIDE = 0.01  # share of scores that may lie beyond either end of a histogram
NEGATIVES = 1024  # of each query, at evenly spaced places
QUERIES = 1024  # of all processes, at evenly spaced places: what a look costs does not grow with the batch


@torch.no_grad()
def measured(looked: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers by name and lists of them, to five decimals. The host waits for the device.

    "scores" (N, 1 + K): of each query the positive and K negative scores, -inf where there is none; "queries" and
    "keys" (N, D), of unit length; with "before_scores" what is about scores comes again, as `before_...`. A histogram
    has the shares of `BINS` equal bins of "histogram_range": [-1, 1], or that doubled until every set of scores fits,
    but for `OUTSIDE`, which goes into the bins at the ends. "auc": how often a positive of any query scores above a
    negative of any query, a tie being half.
    """
    ordered = {}
    for prefix in ("", "before_"):
        rows = looked.get(f"{prefix}scores", torch.empty(0, 1)).float().cpu().numpy()
        for name, x in ((f"{prefix}positive", rows[:, 0]), (f"{prefix}negative", rows[:, 1:])):
            ordered[name] = np.sort(x[x > -np.inf])  # a hundred times as fast as torch
    ordered = {name: x for name, x in ordered.items() if len(x)}
    values = _distributions(ordered)
    for prefix in ("", "before_"):
        if f"{prefix}negative" in ordered:
            values[f"{prefix}auc"] = _auc(ordered[f"{prefix}positive"], ordered[f"{prefix}negative"])
    queries, keys = looked["queries"], looked["keys"]
    values["alignment"] = (queries - keys).square().sum(1).mean().item()
    values |= {"uniformity": uniformity(queries).item(), "effective_rank": effective_rank(queries).item()}
    return {name: np.round(x, 5).tolist() for name, x in values.items()}


def _distributions(ordered: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    quantiles = {name: np.quantile(x, (OUTSIDE, *QUANTILES, 1 - OUTSIDE)) for name, x in ordered.items()}
    reach = max(np.abs(x).max() for x in quantiles.values())
    end = 2.0 ** math.ceil(math.log2(max(reach, 1.0)) - 1e-3)  # a cosine may be 1 and a little more
    inner = np.linspace(-end, end, BINS + 1)[1:-1]
    values = {"histogram_range": np.array([-end, end])}
    for name, x in ordered.items():
        below = np.searchsorted(x, inner)
        values[f"{name}_histogram"] = np.diff(below, prepend=0, append=len(x)) / len(x)
        values[f"{name}_quantiles"] = quantiles[name][1:-1]
    return values


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    below = np.searchsorted(negative, positive) + np.searchsorted(negative, positive, side="right")
    return below.mean() / (2 * len(negative))


def uniformity(features: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different rows of unit vectors (N, D).

    Wang & Isola, ICML 2020, equation 4, t = 2. 0 where all are the same, about -4 + 8 / D where they spread evenly.
    """
    exponents = 4 * (features @ features.T - 1)
    pairs = len(features) * (len(features) - 1)
    return exponents.fill_diagonal_(-torch.inf).flatten().logsumexp(0) - math.log(pairs)


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values of (N, D) over their sum, between 1 and min(N, D); on the CPU.

    RankMe (Garrido et al., ICML 2023, equation 3).
    """
    features = features.double()
    gram = features.T @ features if len(features) > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt()  # of their size slower on a GPU
    return torch.special.entr(singular / singular.sum()).sum().exp()
