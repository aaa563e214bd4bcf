"""How scores and their gradients are distributed over the time of a run: arrays for figures."""

import math

import numpy as np

from visualization.runs import Run

MOMENTS = 16  # of a run at which distributions are shown
BINS = np.linspace(-1, 1, 81)
CELLS = (40, 60)  # of a landscape, over score and time
QUERIES = 400_000  # read for a landscape at most
PUBLISHED_QUEUE = 65536
SHOWN = ("positive", "negative", "before_positive", "before_negative")
Shares = dict[str, np.ndarray]  # by names of `SHOWN`, (B,) each, sum 1
# Values by row, from the bottom up, and column, nan where nothing is; the ranges of columns and rows.
Landscape = tuple[np.ndarray, tuple[float, float], tuple[float, float]]
Moment = tuple[int, np.ndarray, Shares]  # step, middles of the bins (B,), shares


def moments(run: Run) -> list[Moment]:
    """From the log, or else from the score files, in order of time; empty where neither tells."""
    records = [record for record in run.log if record.get("kind") == "scores" and "positive_histogram" in record]
    if records:
        return [_logged(records[i]) for i in _spread(len(records))]
    epochs = list(run.files)
    return [_saved(run, epochs[i]) for i in _spread(len(epochs))]


def gradient_landscape(run: Run, *, before: bool = False) -> Landscape | None:
    """InfoNCE's mean gradient |dL / d positive score| = (1 - p) / T by step and positive score; None where a column is
    missing that it follows from.

    p = exp(s / T) / (exp(s / T) + K * mean exp(negative / T)). K and T are the run's; where it does not tell, K is the
    published queue and T follows from the columns.
    """
    names = ["before_" * before + name for name in ("positive", "positive_logit", "negative_logmeanexp")]
    other_loss = run.options.get("loss") == "nce" or run.options.get("method") == "SwAV"
    if other_loss or not run.columns.issuperset(names):
        return None
    stride = math.ceil(len(run.steps) * run.scores(min(run.files), names[0]).shape[1] / QUERIES)
    parts = [[run.scores(epoch, name)[::stride].copy() for epoch in run.files] for name in ("step", *names)]
    step, positive, logit, negative = (np.concatenate(part).astype(np.float64) for part in parts)
    temperature = run.options.get("temperature") or np.median(positive / logit)
    gradient = 1 / (1 + np.exp(logit - negative - math.log(_negatives(run)))) / temperature
    ranges = np.quantile(positive, (0.002, 0.998)) + (-1e-6, 1e-6), (step[0] - 0.5, step[-1] + 0.5)
    cells = {"bins": (CELLS[0], min(CELLS[1], len(step))), "range": ranges}
    places = positive.ravel(), np.repeat(step, positive.shape[1])
    total, *_ = np.histogram2d(*places, weights=gradient.ravel(), **cells)
    count, *_ = np.histogram2d(*places, **cells)
    return np.divide(total, count, out=np.full(cells["bins"], np.nan), where=count > 0), ranges[1], tuple(ranges[0])


def layer_gradients(run: Run) -> tuple[np.ndarray, tuple[float, float], tuple[float, float], dict[str, float]] | None:
    """A landscape, log10 of the gradient norm by step and layer, counted from the input, and the middle row of each
    part of the network; None where none were logged.
    """
    records = [record for record in run.log if record.get("kind") == "gradients"]
    if not records:
        return None
    layers = dict.fromkeys(layer for record in records for layer in record["norms"])  # SwAV freezes one for a while
    norms = np.array([[record["norms"].get(layer, np.nan) for record in records] for layer in layers])
    steps = (records[0]["step"], records[-1]["step"] + 1)
    rows: dict[str, list[int]] = {}
    for row, layer in enumerate(layers, start=1):
        rows.setdefault(_part(layer), []).append(row)
    middles = {part: sum(found) / len(found) for part, found in rows.items()}
    return np.log10(np.maximum(norms, 1e-12)), steps, (0.5, len(norms) + 0.5), middles


def _part(layer: str) -> str:
    """encoder.backbones.0.layer1.0.conv1 -> layer1."""
    return next(name for name in layer.split(".") if not name.isdigit() and name not in ("encoder", "backbones"))


def _spread(count: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, MOMENTS))}) if count else []


def _logged(record: dict) -> Moment:
    shares = {name: np.array(record[f"{name}_histogram"]) for name in SHOWN if f"{name}_histogram" in record}
    edges = np.linspace(*record["histogram_range"], len(shares["positive"]) + 1)
    return record["step"], (edges[1:] + edges[:-1]) / 2, shares


def _saved(run: Run, epoch: int) -> Moment:
    """Positives as they were; a query's negatives as a normal distribution of its recorded mean and variance."""
    middles, shares = (BINS[1:] + BINS[:-1]) / 2, {}
    for prefix in ("", "before_") if run.shows_before else ("",):
        positive = run.scores(epoch, f"{prefix}positive")
        shares[f"{prefix}positive"] = np.histogram(np.clip(positive, -1, 1), BINS)[0] / positive.size
        if f"{prefix}negative_var" in run.columns:
            some = np.linspace(0, positive.size - 1, min(positive.size, 400)).astype(int)
            mean, variance = (run.scores(epoch, f"{prefix}negative_{name}").ravel()[some] for name in ("mean", "var"))
            width = np.sqrt(variance + (BINS[1] - BINS[0]) ** 2 / 12)[:, None]
            density = (np.exp(-(((middles - mean[:, None]) / width) ** 2) / 2) / width).sum(0)
            shares[f"{prefix}negative"] = density / density.sum()
    return int(run.scores(epoch, "step")[-1]), middles, shares


def _negatives(run: Run) -> int:
    """K of a query in the loss."""
    count = run.options.get("queue_size") or PUBLISHED_QUEUE
    if run.options.get("mem") == "batch":
        count = 2 * run.options["batch_size"] // run.options.get("accumulate", 1) - 2
    return 2 * count if run.options.get("ft_neg") == "append" else count
