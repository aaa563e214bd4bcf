"""Charts as SVG text for an HTML page. Colours come from the page's style sheet, so they follow light and dark; the
page's script reads values under the pointer off the paths, for which a chart carries its scales (data-x, data-y).
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter, MaxNLocator

WIDTH, HEIGHT = 340, 208
LEFT, TOP, RIGHT, BOTTOM = 46, 8, 332, 182  # of the plotted area
Range = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Steps and values (S,), nan where there is a hole; `style`: its classes in the style sheet."""

    label: str
    style: str
    steps: np.ndarray
    values: np.ndarray


def number(value: float) -> str:
    """1.2k, 0.034, 7: three digits."""
    rounded = float(f"{value:.3g}")
    return EngFormatter(sep="")(rounded) if abs(rounded) >= 1000 else f"{rounded:g}"


def span(arrays: Iterable[np.ndarray], pad: float = 0.0) -> Range:
    """Lowest and highest finite value, with room, a share `pad` of their distance; never of length 0."""
    values = np.concatenate([np.ravel(x) for x in arrays])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = pad * (high - low) if high > low else abs(high) * 0.1 or 1.0
    return low - room, high + room


def image(pixels: np.ndarray) -> str:
    """RGBA (H, W, 4) as a data URI."""
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return data_uri(buffer.getvalue(), "png")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chart(lines: Sequence[Line], marks: Mapping[str, Iterable[float]] | None = None) -> str:
    """Values over steps; `marks`: name -> steps where a vertical stands, named on hover."""
    x, y = span([line.steps for line in lines]), span([line.values for line in lines], 0.06)
    verticals = [
        f'<path class="mark" d="M{_at(step, x, LEFT, RIGHT)} {TOP}V{BOTTOM}"><title>{escape(name)}</title></path>'
        for name, steps in (marks or {}).items()
        for step in steps
        if x[0] <= step <= x[1]
    ]
    paths = [
        f'<path class="line {line.style}{" dot" * (len(line.steps) == 1)}" data-label="{escape(line.label)}" '
        f'd="{_path(_at(line.steps, x, LEFT, RIGHT), _at(line.values, y, BOTTOM, TOP))}"/>'
        for line in lines
    ]
    return _framed(x, y, "".join(verticals + paths), "chart")


def heat(values: np.ndarray, x: Range, y: Range, names: Mapping[str, float] | None = None) -> str:
    """(rows, columns) from the bottom up, nan left out, and what the colours mean; names: places on the vertical axis,
    instead of numbers.
    """
    low, high = span([np.nanquantile(values, (0.02, 0.98))])  # a few cells do not take all the colours
    colors = matplotlib.colormaps["viridis"](np.clip((values - low) / (high - low), 0, 1))
    colors[..., 3] = np.isfinite(values)
    box = f'x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"'
    stretched = f'<image {box} preserveAspectRatio="none" href="{image(colors[::-1])}"/>'
    scale = image(np.tile(matplotlib.colormaps["viridis"](np.linspace(0, 1, 64)), (2, 1, 1)))
    key = f'<p class="scale">{number(low)} <img alt="" src="{scale}"> {number(high)}</p>'
    return _framed(x, y, stretched, "heat", _apart(names, y) if names else None) + key


def ridges(rows: Sequence[tuple[int, np.ndarray, Mapping[str, np.ndarray]]], x: Range) -> str:
    """Distributions, the first on top: step, bins (B,) and shares (B,) by style, each drawn to its own height."""
    apart, first = min(22, 330 / len(rows)), 64
    parts = []
    for place, (step, bins, shares) in enumerate(rows):
        floor, seen = first + apart * place, (bins >= x[0]) & (bins <= x[1])
        parts.append(f'<text class="y" x="{LEFT - 4}" y="{floor:.1f}">{number(step)}</text>')
        for style, share in shares.items():
            tops = floor - share[seen] / max(share.max(), 1e-12) * min(2.4 * apart, 54)
            across = _at(bins[seen], x, LEFT, RIGHT)
            outline = f"M{across[0]:g} {floor:.1f}L{_path(across, np.round(tops, 1))[1:]}L{across[-1]:g} {floor:.1f}"
            parts.append(f'<path class="ridge {style.replace("_", " ")}" d="{outline}"/>')
    return _svg("".join(parts) + _x_axis(x, floor + 4), "ridges", floor + 26)


def waterfall(lines: Sequence[Line]) -> str:
    """Lines one behind the other, the first in front; each stands on its own floor."""
    x, y = span([line.steps for line in lines]), span([line.values for line in lines], 0.02)
    depth = min(22, 110 / len(lines))
    back = depth * (len(lines) - 1)
    right, rise, parts = RIGHT - back, BOTTOM - TOP - back * 0.75, []
    for place, line in reversed([*enumerate(lines)]):
        shift, floor = place * depth, BOTTOM - place * depth * 0.75
        across, up = _at(line.steps, x, LEFT, right) + shift, _at(line.values, y, floor, floor - rise)
        known = np.isfinite(up)
        area = f"{_path(across[known], up[known])}L{across[known][-1]:.1f} {floor}H{across[known][0]:.1f}Z"
        parts.append(f'<path class="wall {line.style}" d="{area}"/>')
        title = f"<title>{escape(line.label)}</title>"
        parts.append(f'<path class="line {line.style}" d="{_path(across, up)}">{title}</path>')
    ticks = [
        f'<path class="grid" d="M{LEFT} {at}l{back} {-back * 0.75}h{right - LEFT}"/>'
        f'<text class="y" x="{LEFT - 4}" y="{at + 3}">{name}</text>'
        for at, name in ((_at(value, y, BOTTOM, BOTTOM - rise), name) for value, name in _ticks(y))
    ]
    return _svg("".join(ticks) + "".join(parts) + _x_axis(x, BOTTOM, right), "waterfall", HEIGHT)


def scatter(points: np.ndarray, colors: Sequence[str], titles: Sequence[str]) -> str:
    """(N, 2) points without axes."""
    size = 330
    x, y = (_at(points[:, i], span([points[:, i]], 0.03), *ends) for i, ends in enumerate(((0, size), (size, 0))))
    dots = (
        f'<circle cx="{a}" cy="{b}" r="3" fill="{c}"><title>{escape(t)}</title></circle>'
        for a, b, c, t in zip(x, y, colors, titles)
    )
    return f'<svg class="scatter" viewBox="0 0 {size} {size}" role="img">{"".join(dots)}</svg>'


def _at(value, source: Range, start: float, end: float):
    """From the range `source` to pixels."""
    return np.round(start + (np.asarray(value, float) - source[0]) / (source[1] - source[0]) * (end - start), 2)


def _path(across: np.ndarray, up: np.ndarray) -> str:
    """A path that is broken at nan; a point that stands alone becomes a dot."""
    parts, pen = [], "M"
    for x, y in zip(across.tolist(), up.tolist()):
        known = x == x and y == y
        parts += [f"{pen}{x:g} {y:g}"] if known else []
        pen = "L" if known else "M"
    return "".join(parts) + ("h.01" if len(parts) == 1 else "")


def _ticks(values: Range, count: int = 4) -> list[tuple[float, str]]:
    found = MaxNLocator(count).tick_values(*values)
    return [(value, number(0.0 if abs(value) < 1e-12 else value)) for value in found if values[0] <= value <= values[1]]


def _x_axis(x: Range, bottom: float, right: float = RIGHT) -> str:
    places = [(_at(value, x, LEFT, right), name) for value, name in _ticks(x)]
    labels = [f'<text class="x" x="{at}" y="{bottom + 15:.1f}">{name}</text>' for at, name in places]
    return f'<path class="axis" d="M{LEFT} {bottom:.1f}H{right}"/>{"".join(labels)}'


def _apart(names: Mapping[str, float], y: Range) -> list[tuple[float, str]]:
    """As many of them as do not run into each other."""
    room, kept = 9 * (y[1] - y[0]) / (BOTTOM - TOP), []
    for name, place in names.items():
        if all(abs(place - other) >= room for other, _ in kept):
            kept.append((place, name))
    return kept


def _framed(x: Range, y: Range, content: str, kind: str, ticks: list[tuple[float, str]] | None = None) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/><text class="y" x="{LEFT - 4}" y="{at + 3.5:.1f}">{name}</text>'
        for at, name in ((_at(value, y, BOTTOM, TOP), name) for value, name in ticks or _ticks(y))
    )
    scales = {"x": f"{x[0]:.9g} {x[1]:.9g}", "y": f"{y[0]:.9g} {y[1]:.9g}"}
    return _svg(grid + content + _x_axis(x, BOTTOM), kind, HEIGHT, scales)


def _svg(content: str, kind: str, height: float, scales: Mapping[str, str] | None = None) -> str:
    data = "".join(f' data-{name}="{value}"' for name, value in (scales or {}).items())
    return f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:g}" role="img"{data}>{content}</svg>'
