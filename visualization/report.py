"""One HTML page about runs: what was run, results, curves, scores, the paper's figures, pictures. Needs no network."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        "How often the positive beats every negative. Near 1: is there a leak?",
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
SIDE_BY_SIDE = "The first run in front. Look for a shape that is unlike the others."
RIDGES = "Time runs downwards, from step to step; each ridge is scaled to its own peak."
LANDSCAPE = "Bright pairs move the encoder. Look whether brightness stays, or dies after the first epochs."
LAYERS = "log10 of each layer's gradient norm. Rows that go dark have stopped learning."
VIEWS = "The image, then what training sees of it in its first epoch: a row must stay recognisable."
NEIGHBOURS = "An image of the evaluation set, then those most similar by the backbone, the nearest first."
MAP = "The backbone's features on their two principal axes; a colour is a class. Islands are what k-NN finds."


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
        "Pictures": _pictures(runs, pictures),
    }
    parts = [(title.lower().replace(" ", "-"), title, body) for title, body in sections.items() if body]
    chips = [f'<button value="r{i}" aria-pressed="true">{head}</button>' for i, head in enumerate(_heads(runs))]
    values = {
        "title": f"{len(runs)} runs compared" if len(runs) > 1 else _name(runs[0]),
        "lead": f'<p class="lead">{" · ".join(dict.fromkeys(filter(None, map(_about, runs))))}</p>',
        "contents": "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts),
        "chips": "".join(chips) if len(runs) > 1 else "",
        "body": "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in parts),
        "colors": _palette(runs),
        "command": escape(command),
        "date": f"{datetime.date.today()}",
    }
    return Template((Path(__file__).parent / "report.html").read_text()).substitute(values)


def _palette(runs: Sequence[Run]) -> str:
    """The figures' colours by run, in the dark mixed with white; of a page's own, those of positives and negatives."""
    found = {f"r{i}": to_hex(color) for i, (_, color) in enumerate(colored(runs))}
    found |= {"positive": PALETTE[0], "negative": PALETTE[1]}
    return "\n".join(f".{n} {{ --color: color-mix(in srgb, {c}, white var(--tint)); }}" for n, c in found.items())


def _name(run: Run) -> str:
    return escape(run.label.replace("\n", ""))


def _dot(place: int) -> str:
    return f'<i class="r{place}"></i>'


def _about(run: Run) -> str:
    get = run.options.get
    ft = " with feature transformation" if run.options and run.transforms else ""
    what = f"{get('method')}{ft} on {get('dataset')}, {get('arch')}" if run.options else ""
    return escape(", ".join(filter(None, [what, run.accuracy])))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    body = "".join(f'<tr><td class="key">{row[0]}</td>{"".join(f"<td>{x}</td>" for x in row[1:])}</tr>' for row in rows)
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{x}</th>" for x in head)}</tr>{body}</table></div>'


def _heads(runs: Sequence[Run]) -> list[str]:
    return [f"{_dot(i)} {_name(run)}" for i, run in enumerate(runs)]


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _figure(title: str, hint: str, drawing: str, style: str = "") -> str:
    return f'<figure class="{style}"><figcaption><b>{title}</b>{hint}</figcaption>{drawing}</figure>'


def _panels(intro: str, figures: Sequence[str]) -> str:
    return f'<p>{intro}</p><div class="panels">{"".join(figures)}</div>' if figures else ""


def _results(runs: Sequence[Run]) -> str:
    found = [measures(run) for run in runs]

    def table(accuracies: bool) -> str:
        names = dict.fromkeys(name for values in found for name in values if (", " in name) is accuracies)
        rows = [[name, *(svg.number(values[name]) if name in values else "–" for values in found)] for name in names]
        return _table(["", *_heads(runs)], rows) if rows else ""

    intro = "Top-1 accuracy in %. Quote the last: the best of several epochs was picked on the test images."
    if not table(True):
        intro = "No evaluation lies beside the run; <code>python main_linear.py --ckpt RUN</code> makes one."
    return f"<p>{intro}</p>{table(True)}{_folded('Averages of the last epoch', table(False))}"


def _options(runs: Sequence[Run]) -> str:
    every = {
        name: [run.options.get(name) for run in runs] for name in dict.fromkeys(n for r in runs for n in r.options)
    }
    if not every:
        return ""
    if len(runs) > 1:
        told, intro = differing(runs), "The options in which the runs differ."
    else:
        told, intro = chosen(runs[0]), "The options that are not the default."

    def table(options: dict[str, Sequence]) -> str:
        return _table(
            ["", *_heads(runs)], [[name, *(escape(str(x)) for x in values)] for name, values in options.items()]
        )

    rest = {name: values for name, values in every.items() if name not in told}
    return f'<p>{intro}</p><div class="columns">{table(told)}</div>{_folded("All other options", table(rest))}'


def _diagnosis(runs: Sequence[Run]) -> str:
    found = [(i, record) for i, run in enumerate(runs) for record in run.log if record.get("kind") == "diagnosis"]
    cells = [[f"{_dot(i)} {escape(r['name'])}", escape(r["evidence"]), escape(r["advice"])] for i, r in found]
    return f"<p>What the run noticed about itself.</p>{_table(['', 'evidence', 'advice'], cells)}" if found else ""


def _lines(
    runs: Sequence[Run], read: Callable[[Run, bool], tuple[np.ndarray, np.ndarray] | None], befores: Sequence[bool]
) -> list[svg.Line]:
    """The line that `read` makes of every run's scores after FT, before it, or both; None where there is none."""
    return [
        svg.Line(run.label.replace("\n", "") + " before FT" * before, f"r{i}" + " before" * before, *found)
        for i, run in enumerate(runs)
        for before in befores
        if (run.transforms or not before) and (found := read(run, before)) is not None
    ]


def _logged(kind: str, value: str) -> Callable[[Run, bool], tuple[np.ndarray, np.ndarray] | None]:
    def read(run: Run, before: bool) -> tuple[np.ndarray, np.ndarray] | None:
        steps, values = run.logged(kind, f"before_{value}" if before else value)
        return thinned(steps, values, POINTS) if len(steps) else None

    return read


def _saved(statistic: str) -> Callable[[Run, bool], tuple[np.ndarray, np.ndarray] | None]:
    def read(run: Run, before: bool) -> tuple[np.ndarray, np.ndarray] | None:
        values = run.curve(statistic, before=before)
        return None if values is None else drawable(run.steps, values, POINTS)

    return read


def _marks(runs: Sequence[Run]) -> dict[str, set[float]]:
    names = "transformation starts", "learning-rate drop"
    return {name: {step for run in runs for step in run.marks()[name]} for name in names}


def _curves(runs: Sequence[Run]) -> str:
    marks, drawn = _marks(runs), {}
    for (kind, value), about in CURVES.items():
        if lines := _lines(runs, _logged(kind, value), (False, True)):
            drawn[value] = about, lines
    figures = [_figure(*about, svg.chart(lines, marks)) for about, lines in drawn.values()]
    rows = [
        [f'{value} <i class="{line.style}"></i> {escape(line.label)}', *map(svg.number, _ends(line.values))]
        for value, (_, lines) in drawn.items()
        for line in lines
    ]
    numbers = _folded("Numbers", _table(["", "first", "last", "lowest", "highest"], rows))
    intro = (
        "As logged while training. Dotted: the scores before feature transformation. Upright lines: it starts, or the "
        "learning rate drops."
    )
    return _panels(intro, figures) + numbers if figures else ""


def _ends(values: np.ndarray) -> tuple[float, ...]:
    return values[0], values[-1], np.nanmin(values), np.nanmax(values)


def _paper(runs: Sequence[Run]) -> str:
    """Needs score files."""
    marks, figures = _marks(runs), []
    for when, befores in (("", [False]), (", before FT", [True])):
        for statistic in STATISTICS:
            if lines := _lines(runs, _saved(statistic), befores):
                figures.append(_figure(TITLES[statistic] + when, HINTS[statistic], svg.chart(lines, marks)))
    for statistic in STATISTICS:
        lines = _lines(runs, _saved(statistic), (False, True))
        if len(lines) > 1:
            figures.append(_figure(f"{TITLES[statistic]}, in depth", SIDE_BY_SIDE, svg.waterfall(lines)))
    intro = "Every training step, as the mean over its batch, after the paper's figures."
    return _panels(intro, figures)


def _distributions(runs: Sequence[Run]) -> str:
    found = {i: rows for i, run in enumerate(runs) if (rows := moments(run))}
    visible = [bins[share > 0.002] for rows in found.values() for _, bins, shares in rows for share in shares.values()]
    drawn = {i: svg.ridges(rows, svg.span(visible)) for i, rows in found.items()}
    return _panels(
        '<i class="positive"></i> Positives, <i class="negative"></i> negatives; dotted: before feature transformation. '
        "Learning draws the two apart; where they overlap, pairs are confused.",
        [_figure(_name(runs[i]), RIDGES, drawing, f"r{i}") for i, drawing in drawn.items()],
    )


def _landscapes(runs: Sequence[Run]) -> str:
    figures = []
    for i, run in enumerate(runs):
        for before in (False, True) if run.shows_before else (False,):
            if found := gradient_landscape(run, before=before):
                grid, score, steps = found
                title = _name(run) + ", before FT" * before
                figures.append(_figure(title, LANDSCAPE, svg.heat(grid, steps, score), f"r{i}"))
        if found := layer_gradients(run):
            names, norms, steps = found
            drawing = svg.heat(norms, svg.span([steps]), (0, 1), names)
            figures.append(_figure(f"{_name(run)}, by layer", LAYERS, drawing, f"r{i}"))
    return _panels(
        "How strongly a positive pair is pulled, depending on its score (upwards) and on when (to the right): "
        "|∂loss / ∂positive score|, from the recorded scores. Dark cells have been learned and give little.",
        figures,
    )


def _pictures(runs: Sequence[Run], pictures: Sequence[Pictures | str]) -> str:
    parts = []
    for i, (run, found) in enumerate(zip(runs, pictures)):
        if isinstance(found, str):
            parts.append(f'<p class="note r{i}">{_name(run)}: {escape(found)}</p>')
            continue
        views, neighbours = (f'<img class="sheet" alt="" src="{svg.data_uri(x, "webp")}">' for x in found.sheets)
        figures = [_figure("Views", VIEWS, views), _figure("Neighbours", NEIGHBOURS, neighbours)]
        figures.append(_figure("Map", MAP, _map(found)))
        head = f"<h3>{_dot(i)} {_name(run)}</h3>" if len(runs) > 1 else ""
        parts.append(f'<div class="r{i}">{head}<div class="panels">{"".join(figures)}</div></div>')
    return f"<p>What goes in, and what the trained encoder makes of it.</p>{''.join(parts)}" if parts else ""


def _map(found: Pictures) -> str:
    names = [found.classes[label] for label in found.labels]
    colors = [f"hsl({360 * label / len(found.classes):.0f} 62% 55%)" for label in found.labels]
    return svg.scatter(found.points, colors, names)
