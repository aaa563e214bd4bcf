"""One HTML page about runs: what was run, results, curves, scores, the paper's figures, pictures. Needs no network."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from matplotlib.colors import to_hex

from visualization import svg
from visualization.distributions import gradient_landscape, layer_gradients, moments
from visualization.figures import PALETTE, STATISTICS, TITLES, colored, drawable, thinned
from visualization.runs import Run, chosen, differing, measures

POINTS = 500  # of a line
# Kind of record and value in log.jsonl -> title and what to look at.
CURVES = {
    ("step", "loss"): ("Training loss", "Near log(1 + negatives) nothing is learned. It rises while a queue fills."),
    ("step", "contrast_acc"): (
        "Contrast accuracy",
        "How often the positive beats every negative. Near 1: a leak?",
    ),
    ("knn", "backbone_top1"): ("k-NN on the backbone (%)", "What the features are worth; the curve to trust."),
    ("knn", "head_top1"): ("k-NN on the head (%)", "Of the space in which the loss works."),
    ("step", "gap"): ("Gap of the means", "Positive minus negative score: how far the two come apart."),
    ("step", "negative_max"): ("Hardest negative", "Mean score of each query's most similar negative."),
    ("scores", "auc"): ("Overlap (AUC)", "Chance that a positive scores above a negative: 0.5 is none."),
    ("scores", "alignment"): ("Alignment", "Squared distance of positive pairs: lower means more invariant."),
    ("scores", "uniformity"): ("Uniformity", "Lower means spread over the sphere; 0 means one point."),
    ("scores", "effective_rank"): ("Effective rank", "Dimensions in use. A fall towards 1 is a collapse."),
    ("step", "feature_std"): ("Spread of the embeddings", "1/√D where they spread, 0 where they have collapsed."),
    ("step", "positive_gradient"): ("Gradient per positive score", "What pulls pairs together; FT makes it larger."),
    ("step", "queue_age"): ("Age of the keys", "Mean number of steps since a key was computed."),
    ("step", "learning_rate"): ("Learning rate", "The schedule, to read the other curves by."),
    ("step", "images_per_second"): ("Images per second", "Dips are the machine's, not the method's."),
}

HINTS = {
    "negative_variance": "How differently negatives score. Large and restless: training is unstable.",
    "negative_mean": "Near 0 where features fill the sphere; near 1 in a collapse.",
    "positive_mean": "High means easy positives. FT lowers it at once, and learning answers.",
}
DOTTED = "Dotted: before feature transformation."
UPRIGHT = "it starts, or the learning rate drops."
DEPTH = "The first run in front. Look for a shape that is unlike the others."
DEPTH_FT = "After feature transformation in front, before it behind."
RIDGES = "Time runs downwards, from step to step; each ridge is scaled to its own peak."
LANDSCAPE = "Bright pairs move the encoder. Look whether brightness stays, or dies after the first epochs."
LAYERS = (
    "log10 of each layer's gradient norm, upwards from the input to the head. Rows that turn dark have stopped "
    "learning; those of batch norms, between the convolutions, are dark for having few weights."
)
VIEWS = "The image, then what training sees of it in its first epoch: a row must stay recognisable."
NEIGHBOURS = "An image of the training set, then those most similar by the backbone, the nearest first."
MAP = "The backbone's features on their two principal axes; a colour is a class. Islands are what k-NN finds."
Read = Callable[[Run, bool], tuple[np.ndarray, np.ndarray] | None]


@dataclass(frozen=True)
class Pictures:
    """Sheets of views and of neighbours as WebP; features in the plane (N, 2), their classes (N,) and those' names."""

    sheets: tuple[bytes, bytes]
    points: np.ndarray
    labels: Sequence[int]
    classes: Sequence[str]


def page(runs: Sequence[Run], pictures: Sequence[Pictures | str], command: str) -> str:
    """The whole page. `pictures`: of every run, or the sentence that says why there are none."""
    sections = {
        "Results": _results(runs),
        "What was run": _options(runs),
        "Diagnosis": _diagnosis(runs),
        "Curves": _curves(runs),
        "Scores over time": _distributions(runs),
        "Paper figures": _paper(runs),
        "Gradient landscape": _landscapes(runs),
        "Pictures": "".join(_pictures(*each) for each in zip(runs, _heads(runs), range(len(runs)), pictures)),
    }
    parts = [(title.lower().replace(" ", "-"), title, body) for title, body in sections.items() if body]
    chips = [f'<button value="r{i}" aria-pressed="true">{head}</button>' for i, head in enumerate(_heads(runs))]
    values = {
        "title": f"{len(runs)} runs compared" if len(runs) > 1 else _name(runs[0]),
        "lead": " · ".join(dict.fromkeys(filter(None, map(_about, runs)))),
        "contents": "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts),
        "chips": "".join(chips),
        "body": "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in parts),
        "colors": _palette(runs),
        "command": escape(command),
        "date": f"{datetime.date.today()}",
    }
    return Template((Path(__file__).parent / "report.html").read_text()).substitute(values)


def _palette(runs: Sequence[Run]) -> str:
    """The figures' colours by run, and of positives and negatives; in the dark mixed with white."""
    found = {f"r{i}": to_hex(color) for i, (_, color) in enumerate(colored(runs))}
    found |= {"positive": PALETTE[0], "negative": PALETTE[1]}
    return "\n".join(f".{n} {{ --color: color-mix(in srgb, {c}, white var(--tint)); }}" for n, c in found.items())


def _name(run: Run) -> str:
    return escape(run.label.replace("\n", ""))


def _heads(runs: Sequence[Run]) -> list[str]:
    return [f'<i class="r{i}"></i> {_name(run)}' for i, run in enumerate(runs)]


def _about(run: Run) -> str:
    told = [str(run.options[name]) for name in ("method", "dataset", "arch") if name in run.options]
    ft = ["feature transformation"] if run.options and run.transforms else []
    return escape(", ".join(filter(None, [*told, *ft, run.accuracy])))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], folded: str = "") -> str:
    """Cells are HTML; "" without rows; `folded`: under this title, to be opened."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<div class="scroll"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{body}</table></div>'
    return (f"<details><summary>{folded}</summary>{table}</details>" if folded else table) if rows else ""


def _figure(title: str, hint: str, drawing: str, style: str = "") -> str:
    return f'<figure class="{style}"><figcaption><b>{title}</b>{hint}</figcaption>{drawing}</figure>'


def _panels(intro: str, figures: Sequence[str]) -> str:
    return f'<p>{intro}</p><div class="panels">{"".join(figures)}</div>' if figures else ""


def _results(runs: Sequence[Run]) -> str:
    found, heads = [measures(run) for run in runs], ["", *_heads(runs)]
    names = dict.fromkeys(name for values in found for name in values)
    rows = {escape(name): [svg.number(values[name]) if name in values else "–" for values in found] for name in names}
    top1, rest = ([[name, *x] for name, x in rows.items() if (", " in name) is wanted] for wanted in (True, False))
    intro = "Top-1 accuracy in %. Quote the last: the best of several epochs was picked on the test images."
    if not top1:
        intro = "No evaluation lies beside the run; <code>python main_linear.py --ckpt RUN</code> makes one."
    return f"<p>{intro}</p>{_table(heads, top1)}{_table(heads, rest, 'Averages of the last epoch')}"


def _options(runs: Sequence[Run]) -> str:
    told, intro = differing(runs), "The options in which the runs differ."
    if len(runs) == 1:
        told, intro = chosen(runs[0]), "The options that are not the default."
    every = {name: [run.options.get(name) for run in runs] for name in runs[0].options}
    rest = {name: values for name, values in every.items() if name not in told}
    tables = ([[escape(str(x)) for x in (name, *xs)] for name, xs in rows.items()] for rows in (told, rest))
    heads, shape = ["", *_heads(runs)], "columns" if len(runs) == 1 else ""
    shown, hidden = _table(heads, next(tables)), _table(heads, next(tables), "All other options")
    return f'<p>{intro}</p><div class="{shape}">{shown}</div>{hidden}' if shown else ""


def _diagnosis(runs: Sequence[Run]) -> str:
    found = [(i, record) for i, run in enumerate(runs) for record in run.log if record.get("kind") == "diagnosis"]
    names = ("name", "evidence", "advice")
    return _table(names, [[f'<i class="r{i}"></i> ' * (n == "name") + escape(r[n]) for n in names] for i, r in found])


def _lines(runs: Sequence[Run], read: Read) -> list[svg.Line]:
    """The lines that `read` makes of every run, of one with FT before it as well; None where there is nothing."""
    return [
        svg.Line(run.label.replace("\n", "") + " before FT" * before, f"r{i}" + " before" * before, *found)
        for i, run in enumerate(runs)
        for before in ((False, True) if run.transforms else (False,))
        if (found := read(run, before)) is not None
    ]


def _logged(kind: str, value: str, run: Run, before: bool) -> tuple[np.ndarray, np.ndarray] | None:
    steps, values = run.logged(kind, f"before_{value}" if before else value)
    return thinned(steps, values, POINTS) if len(steps) else None


def _saved(statistic: str, run: Run, before: bool) -> tuple[np.ndarray, np.ndarray] | None:
    values = run.curve(statistic, before=before)
    return None if values is None else drawable(run.steps, values, POINTS)


def _marks(runs: Sequence[Run]) -> dict[str, set[float]]:
    names = "transformation starts", "learning-rate drop"
    return {name: {step for run in runs for step in run.marks()[name]} for name in names}


def _curves(runs: Sequence[Run]) -> str:
    found = {(value, *about): _lines(runs, partial(_logged, kind, value)) for (kind, value), about in CURVES.items()}
    figures = [_figure(*about, svg.chart(lines, _marks(runs))) for (_, *about), lines in found.items() if lines]
    rows = [
        [value, f'<i class="{line.style}"></i> {escape(line.label)}', *(svg.number(x) for x in _ends(line.values))]
        for (value, *_), lines in found.items()
        for line in lines
    ]
    numbers = _table(["", "", "first", "last", "lowest", "highest"], rows, "Numbers")
    return _panels(f"As logged while training. {DOTTED} Upright lines: {UPRIGHT}", figures) + numbers


def _ends(values: np.ndarray) -> tuple[float, ...]:
    return values[0], values[-1], np.nanmin(values), np.nanmax(values)


def _paper(runs: Sequence[Run]) -> str:
    lines = {name: found for name in STATISTICS if (found := _lines(runs, partial(_saved, name)))}
    flat = [_figure(TITLES[name], HINTS[name], svg.chart(found, _marks(runs))) for name, found in lines.items()]
    deep = [
        _figure(f"{TITLES[name]}, in depth", DEPTH if len(runs) > 1 else DEPTH_FT, svg.waterfall(found))
        for name, found in lines.items()
        if len(found) > 1
    ]
    return _panels(f"Every step, as the mean over its batch, after the figures of the paper. {DOTTED}", flat + deep)


def _distributions(runs: Sequence[Run]) -> str:
    found = {i: rows for i, run in enumerate(runs) if (rows := moments(run))}
    seen = [bins[share > 0.01] for rows in found.values() for _, bins, shares in rows for share in shares.values()]
    figures = [_figure(_name(runs[i]), RIDGES, svg.ridges(rows, svg.span(seen)), f"r{i}") for i, rows in found.items()]
    kinds = '<i class="positive"></i> Positives and <i class="negative"></i> negatives'
    return _panels(f"{kinds}. {DOTTED} Learning draws the two apart; where they overlap, pairs are confused.", figures)


def _landscapes(runs: Sequence[Run]) -> str:
    figures = []
    for i, run in enumerate(runs):
        for before in (False, True) if run.shows_before else (False,):
            if found := gradient_landscape(run, before=before):
                title = _name(run) + ", before FT" * before
                figures.append(_figure(title, LANDSCAPE, svg.heat(*found), f"r{i}"))
        if found := layer_gradients(run):
            figures.append(_figure(f"{_name(run)}, by layer", LAYERS, svg.heat(*found), f"r{i}"))
    return _panels(
        "How strongly a positive pair is pulled, by score (upwards) and step (to the right): the size of ∂loss / "
        "∂positive score, from the recorded scores. Purple pairs are learned and give little; empty cells had none.",
        figures,
    )


def _pictures(run: Run, head: str, place: int, found: Pictures | str) -> str:
    if isinstance(found, str):
        return f'<p class="r{place}">{_name(run)}: {escape(found)}</p>'
    views, neighbours = (f'<img class="sheet" alt="" src="{svg.data_uri(x, "webp")}">' for x in found.sheets)
    colors = [f"hsl({360 * label / len(found.classes):.0f} 62% 55%)" for label in found.labels]
    plane = svg.scatter(found.points, colors, [found.classes[label] for label in found.labels])
    figures = _figure("Views", VIEWS, views), _figure("Neighbours", NEIGHBOURS, neighbours), _figure("Map", MAP, plane)
    return f'<div class="r{place}"><h3>{head}</h3><div class="panels">{"".join(figures)}</div></div>'
