"""What a log line shows of one step: how its scores are distributed, and how its embeddings lie on the sphere."""

import math

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 64
OUTSIDE = 0.01  # share of scores that may lie beyond either end of a histogram
NEGATIVES = 512  # of each query, at evenly spaced places: enough for a histogram, and little to sort
EMBEDDINGS = 4096  # the most of which all pairs are looked at


@torch.no_grad()
def measured(looked: dict[str, Tensor]) -> dict[str, float | list[float]]:
    """What is in `looked`, as numbers of five decimals by name. The host waits for the device.

    "scores" (N, 1 + K): of each query the positive and K negative scores, -inf where there is none; "queries" and
    "keys" (N, D), of unit length; with "before_scores" what is about scores comes again, as `before_...`. A histogram
    has the shares of `BINS` equal bins of "histogram_range", [-1, 1] or that doubled until every set of scores fits but
    for `OUTSIDE`, which goes into the bins at the ends. "auc": how often a positive of any query scores above a
    negative of any query, a tie being half.
    """
    sides = {}
    for prefix in ("", "before_"):
        rows = looked.get(f"{prefix}scores", torch.empty(0, 1)).float()
        sides |= {f"{prefix}positive": rows[:, 0], f"{prefix}negative": rows[:, 1:]}
    counted = {name: x[x > -torch.inf] for name, x in sides.items()}
    ordered = {name: x.sort().values for name, x in counted.items() if len(x)}
    quantiles = {name: _quantiles(x, (OUTSIDE, *QUANTILES, 1 - OUTSIDE)) for name, x in ordered.items()}
    reach = max(x.abs().max().item() for x in quantiles.values())
    end = 2.0 ** max(math.ceil(math.log2(reach) - 1e-3), 0)
    values = {f"{name}_histogram": _histogram(x, end) for name, x in ordered.items()}
    values |= {f"{name}_quantiles": x[1:-1] for name, x in quantiles.items()}
    for prefix in ("", "before_"):
        if f"{prefix}negative" in ordered:
            values[f"{prefix}auc"] = _auc(ordered[f"{prefix}positive"], ordered[f"{prefix}negative"])
    values["alignment"] = (looked["queries"] - looked["keys"]).square().sum(1).mean()
    queries = looked["queries"][:: math.ceil(len(looked["queries"]) / EMBEDDINGS)]
    values |= {"uniformity": uniformity(queries), "effective_rank": effective_rank(queries)}
    return {"histogram_range": [-end, end]} | {name: _rounded(x.tolist()) for name, x in values.items()}


def _quantiles(ordered: Tensor, shares: tuple[float, ...]) -> Tensor:
    place = torch.tensor(shares, dtype=torch.float64) * (len(ordered) - 1)
    low = place.floor()
    return torch.lerp(ordered[low.long()], ordered[place.ceil().long()], (place - low).to(ordered))


def _histogram(ordered: Tensor, end: float) -> Tensor:
    inner = torch.linspace(-end, end, BINS + 1)[1:-1].to(ordered)
    below = torch.searchsorted(ordered, inner)
    return below.diff(prepend=below.new_zeros(1), append=below.new_tensor([len(ordered)])) / len(ordered)


def _auc(positive: Tensor, negative: Tensor) -> Tensor:
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return below.double().mean() / (2 * len(negative))


def uniformity(features: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different rows of unit vectors (N, D).

    Wang & Isola, ICML 2020, equation 4, t = 2. 0 where all are the same, about -4 + 8 / D where they spread evenly.
    """
    exponents = 4 * (features @ features.T - 1)
    pairs = len(features) * (len(features) - 1)
    return exponents.fill_diagonal_(-torch.inf).flatten().logsumexp(0) - math.log(pairs)


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values of (N, D) over their sum, between 1 and min(N, D).

    RankMe (Garrido et al., ICML 2023, equation 3).
    """
    features = features.double()
    gram = features.T @ features if len(features) > features.shape[1] else features @ features.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp()


def _rounded(value: float | list[float]) -> float | list[float]:
    return round(value, 5) if isinstance(value, float) else [round(x, 5) for x in value]
