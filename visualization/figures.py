"""Figures of score statistics over training, after "Improving Contrastive Learning by Visualizing Feature
Transformation" (ICCV 2021). Each function returns a matplotlib Figure made without pyplot: no display is needed.
What no run recorded is left out: SimSiam and BYOL, say, have no negatives.

smooth: window, in steps, of a centred moving average drawn over the pale raw line; None draws the raw line alone.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from visualization.runs import Run

TITLES = {
    "negative_variance": "Variance of negative scores",
    "negative_mean": "Mean of negative scores",
    "positive_mean": "Mean of positive scores",
    "gap": "Positive mean − negative mean",
}
DISTRIBUTIONS = {
    "positive": "Score of the positive",
    "negative_max": "Score of the hardest negative",
    "negative_var": "Variance of a query's negatives",
}
STATISTICS = ("negative_variance", "negative_mean", "positive_mean")
# Kind of record and value in log.jsonl -> title and look, the more important ones first.
LOGGED = {
    ("step", "loss"): ("Training loss", {}),
    ("knn", "backbone_top1"): ("k-NN accuracy (%)", {"marker": "o", "markersize": 4}),
    ("step", "feature_std"): ("Spread of the embeddings", {}),
    ("step", "learning_rate"): ("Learning rate", {}),
}
PAGES = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3)}  # number of panels -> rows and columns
MARKS = {
    "end of epoch 1": {"linestyle": ":", "linewidth": 0.9},
    "learning-rate drop": {"linestyle": (0, (7, 4)), "linewidth": 0.9},
    "transformation starts": {"linestyle": "-.", "linewidth": 0.9},
}
DASHED = {"linestyle": (0, (2.5, 1)), "linewidth": 1.0}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")  # Okabe and Ito
GREY = "#8a8a8a"
POINTS = 4000  # of a drawn line; more than any figure has pixels
LOOK = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}
styled = style.context(["default", LOOK])  # the reader's own matplotlibrc does not leak in

Lines = list[tuple[Run, str]]  # runs and their colours


def recorded(runs: Sequence[Run], statistics: Sequence[str] = STATISTICS) -> list[str]:
    """Those of `statistics` that at least one run has."""
    return [name for name in statistics if any(run.curve(name) is not None for run in runs)]


@styled
def compare(runs: Sequence[Run], *statistics: str, smooth: int | None = None) -> Figure:
    """A panel per statistic (a key of `TITLES`; default: the three of the paper), a line per run.

    ValueError for a statistic that no run has.
    """
    statistics = _asked(runs, statistics)
    figure = Figure(figsize=(5.2, 3.6) if len(statistics) == 1 else (10, 3.2), layout="constrained")
    lines = colored(runs)
    for axes, statistic in zip(figure.subplots(1, len(statistics), squeeze=False)[0], statistics):
        _curves(axes, lines, statistic, smooth=smooth)
        _finish(axes, TITLES[statistic])
        _mark(axes, lines)
    _legend(figure, lines, _mark_looks(lines))
    return figure


@styled
def grid(*groups: Sequence[Run], smooth: int | None = None) -> Figure:
    """The three statistics in columns. One group of runs: scores after and, if recorded, before FT in rows. Several: a
    row per group on its own scale, as the paper sets stable runs over unstable ones.
    """
    lines = colored([run for group in groups for run in group])
    statistics = recorded([run for run, _ in lines])
    rest = iter(lines)
    rows = [("", list(islice(rest, len(group))), False) for group in groups]
    if len(groups) == 1 and any(run.shows_before for run, _ in lines):
        rows = [("after transformation", lines, False), ("before transformation", lines, True)]
    figure = Figure(figsize=(10, 0.3 + 2.6 * len(rows)), layout="constrained")
    scale = {"sharex": True, "sharey": "col" if len(groups) == 1 else False}
    panels = figure.subplots(len(rows), len(statistics), squeeze=False, **scale)
    for line, (name, group, before) in zip(panels, rows):
        for axes, statistic in zip(line, statistics):
            _curves(axes, group, statistic, before=before, smooth=smooth)
            _finish(axes, TITLES[statistic])
            _mark(axes, group)
        line[0].set_ylabel(name, fontweight="bold")
    _legend(figure, lines, _mark_looks(lines))
    return figure


@styled
def overview(runs: Sequence[Run], *, smooth: int | None = None) -> Figure:
    """Scores after FT (solid) and before it (dashed), the loss, k-NN accuracy if measured, else learning rate; without
    negatives also how far the embeddings spread.
    """
    lines = colored(runs)
    earlier = [(run, color if len(lines) > 1 else PALETTE[1]) for run, color in lines if run.shows_before]
    found: list = recorded(runs, ("positive_mean", "negative_mean", "negative_variance", "gap"))
    found += [key for key in LOGGED if any(len(run.logged(*key)[0]) for run in runs)]
    rows, columns = PAGES[max(count for count in PAGES if count <= len(found))]
    figure = Figure(figsize=(max(10 / 3 * columns, 5.2), 2.6 * rows), layout="constrained")
    for axes, content in zip(figure.subplots(rows, columns, sharex=True, squeeze=False).flat, found):
        if content in LOGGED:
            _logged(axes, lines, *content)
        else:
            _curves(axes, earlier, content, before=True, smooth=smooth, **DASHED)
            _curves(axes, lines, content, smooth=smooth)
            _finish(axes, TITLES[content])
        _mark(axes, lines)
    look = DASHED | {"color": GREY if len(lines) > 1 else PALETTE[1]}
    _legend(figure, lines, {"before transformation": look} if earlier else {}, _mark_looks(lines))
    return figure


@styled
def waterfall(runs: Sequence[Run], *statistics: str, smooth: int | None = None) -> Figure:
    """3-D: runs side by side along x, iterations along y, the statistic (default: the three of the paper) upwards.

    ValueError for a statistic that no run has.
    """
    statistics = _asked(runs, statistics)
    figure, lines = Figure(figsize=(4.4 * len(statistics) + 1, 4.2)), colored(runs)
    panels = figure.subplots(1, len(statistics), squeeze=False, subplot_kw={"projection": "3d"})[0]
    for axes, statistic in zip(panels, statistics):
        for place, (run, color) in enumerate(lines, start=1):
            values = run.curve(statistic)
            if values is not None:
                steps, values = drawable(run.steps, _smoothed(values, smooth), points=600)
                axes.plot(np.full(len(steps), place), steps, values, color=color, linewidth=0.9)
        _finish_3d(axes, statistic, [run.label for run in runs])
    figure.subplots_adjust(left=0.02, right=0.95, bottom=_legend(figure, lines) + 0.08, top=0.98, wspace=0.12)
    return figure


@styled
def distributions(runs: Sequence[Run]) -> Figure:
    """A row per run: how the queries of its last epoch spread, after FT (filled) and before it (outlined), without the
    outermost thousandth on either side.

    ValueError where no run has any of the columns.
    """
    columns = [name for name in DISTRIBUTIONS if any(name in run.columns for run in runs)]
    if not columns:
        raise ValueError("none of these runs recorded scores of single queries: train with --save_score")
    figure = Figure(figsize=(10, 0.5 + 1.7 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), len(columns), sharex="col", squeeze=False)
    for line, run in zip(panels, runs):
        for axes, column in zip(line, columns):
            _histograms(axes, run, column)
        line[0].set_ylabel(fill(run.label, 18), fontweight="bold")
    for axes, column in zip(panels[0], columns):
        axes.set_title(DISTRIBUTIONS[column])
    handles = [Patch(color=PALETTE[0], alpha=0.6, label="after transformation, as the loss sees it")]
    handles += [Line2D([], [], color=PALETTE[1], label="before")] * any(run.shows_before for run in runs)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format its name ends in, such as .png or .pdf; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _asked(runs: Sequence[Run], statistics: Sequence[str]) -> Sequence[str]:
    """`statistics`, which all have to be there, or else as many as there are of the paper's three."""
    missing = [name for name in statistics if not recorded(runs, [name])]
    if missing:
        raise ValueError(
            f"{missing[0]} was not recorded by any of these runs, as methods without negatives do not have it: "
            f"draw {' or '.join(recorded(runs))}"
        )
    return statistics or recorded(runs)


def _curves(axes: Axes, lines: Lines, statistic: str, *, smooth: int | None, before: bool = False, **look) -> None:
    for run, color in lines:
        values = run.curve(statistic, before=before)
        if values is None:
            continue
        if smooth:
            axes.plot(*drawable(run.steps, values), color=color, linewidth=0.7, alpha=0.25)
        axes.plot(*drawable(run.steps, _smoothed(values, smooth)), color=color, **look)


def _histograms(axes: Axes, run: Run, column: str) -> None:
    axes.set_yticks([])
    looks = {column: {"histtype": "stepfilled", "color": PALETTE[0], "alpha": 0.6}}
    looks |= {f"before_{column}": {"histtype": "step", "color": PALETTE[1]}} if run.shows_before else {}
    values = {name: run.scores(max(run.files), name).ravel() for name in looks if name in run.columns}
    for name, drawn in values.items():
        low, high = np.quantile(np.concatenate([*values.values()]), (0.001, 0.999))
        axes.hist(drawn, np.linspace(low - 1e-3, high + 1e-3, 81), density=True, **looks[name])


def _logged(axes: Axes, lines: Lines, kind: str, value: str) -> None:
    title, look = LOGGED[kind, value]
    for run, color in lines:
        steps, values = run.logged(kind, value)
        if len(steps):
            axes.plot(steps, values, color=color, **look)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel("Iterations")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)
    if not axes.lines:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)


def _finish_3d(axes: Axes, statistic: str, names: Sequence[str]) -> None:
    axes.set_title(TITLES[statistic], loc="center", y=1)
    places = range(1, len(names) + 1)
    short = sum(map(len, names)) <= 25
    axes.set_xticks(places, names if short else places)
    axes.set_xlabel("" if short else "Runs, as in the legend", labelpad=6)
    axes.set_ylabel("Iterations", labelpad=8)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.view_init(elev=22, azim=-52)
    axes.set_box_aspect((1.1, 1.3, 0.9))


def _mark(axes: Axes, lines: Lines) -> None:
    """Verticals where something happened, in the run's colour if it happened to one of several runs only."""
    for name, look in _mark_looks(lines).items():
        marks = [(step, color) for run, color in lines for step in run.marks()[name]]
        for step in {step for step, _ in marks}:
            owners = [color for other, color in marks if other == step]
            axes.axvline(step, color=owners[0] if len(owners) == 1 < len(lines) else GREY, zorder=1, **look)


def _mark_looks(lines: Lines) -> dict[str, dict]:
    """Line style of every kind of mark that some run has."""
    return {name: look for name, look in MARKS.items() if any(run.marks()[name] for run, _ in lines)}


def _legend(figure: Figure, lines: Lines, *dashed: dict[str, dict]) -> float:
    """Runs, then what the dashes mean; below the panels, in as many columns as fit. Returns its share of the height."""
    handles = [Line2D([], [], color=color, linewidth=2, label=run.legend) for run, color in lines]
    handles += [Line2D([], [], label=n, **{"color": GREY, **look}) for looks in dashed for n, look in looks.items()]
    longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    columns = min(max(int(figure.get_figwidth() * 14 / (longest + 6)), 1), len(handles), 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    rows = -(-len(handles) // columns) * max(handle.get_label().count("\n") + 1 for handle in handles)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)  # the panels keep their height
    return 0.2 * rows / figure.get_figheight()


def colored(runs: Sequence[Run]) -> Lines:
    """Every run and its colour."""
    many = matplotlib.colormaps["viridis"](np.linspace(0, 0.86, len(runs)))
    return list(zip(runs, PALETTE if len(runs) <= len(PALETTE) else many))


def _smoothed(values: np.ndarray, window: int | None) -> np.ndarray:
    """Centred moving average over `window` steps, fewer at both ends."""
    if not window:
        return values
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def drawable(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The line, broken where steps were not recorded, `thinned`."""
    holes = np.flatnonzero(np.diff(steps) > 1) + 1
    return thinned(np.insert(steps.astype(float), holes, np.nan), np.insert(values, holes, np.nan), points)


def thinned(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a long line the lowest and highest point of each bucket."""
    size = 2 * len(values) // points
    if size < 2:
        return steps, values
    buckets = values[: len(values) // size * size].reshape(-1, size)
    extremes = np.stack([buckets.argmin(1), buckets.argmax(1)], 1) + np.arange(len(buckets))[:, None] * size
    keep = np.unique(np.append(extremes, len(values) - 1))
    return steps[keep], values[keep]
