"""The built-in data set: small pictures of one textured shape, drawn on the spot, the same bytes on every call."""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
COUNTS = {"train": 5000, "val": 2000}
SHAPES = ("disc", "square")
TEXTURES = ("stripes", "waves", "checks", "dots", "rings")
CLASSES: tuple[str, ...] = tuple(f"{texture}-{shape}" for texture in TEXTURES for shape in SHAPES)
MEAN = (0.5, 0.5, 0.5)
STD = (0.2, 0.2, 0.2)

_SUPERSAMPLE = 4
_CORNERS = {"square": 4, "triangle": 3}
# One pair of colours for all: were every picture given its own, colour alone would tell the pictures apart and a
# contrastive learner would look no further.
_DARK, _LIGHT, _GROUND = np.array([[40, 70, 105], [240, 195, 120], [128, 132, 138]])
_GRID = (np.arange(SIZE) + 0.5 - SIZE / 2).astype(np.float64)


@cache
def render(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a whole split: pictures uint8 (N, 32, 32, 3) and labels int64 (N,), N = 5,000 ("train") or 2,000 ("val")."""
    if split not in COUNTS:
        raise ValueError(f"The built-in set has no split '{split}': use one of {', '.join(COUNTS)}.")
    labels = np.arange(COUNTS[split], dtype=np.int64) % len(CLASSES)
    images = np.stack([_draw(split, index, int(label)) for index, label in enumerate(labels)])
    for array in (images, labels):
        array.flags.writeable = False  # the cache hands the same arrays to every caller
    return images, labels


def _draw(split: str, index: int, label: int) -> np.ndarray:
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    texture, shape = TEXTURES[label // len(SHAPES)], SHAPES[label % len(SHAPES)]
    centre = rng.uniform(-3, 3, 2)
    mask = _mask(rng, shape, centre)[..., None]
    blend = 0.5 + 0.5 * _pattern(rng, texture, centre)[..., None]
    ground = _GROUND + _background(rng)[..., None]
    picture = mask * (_DARK + blend * (_LIGHT - _DARK)) + (1 - mask) * ground
    picture = picture + rng.uniform(-8, 8, (SIZE, SIZE, 1))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _mask(rng: np.random.Generator, shape: str, centre: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, (32, 32) in 0..1."""
    canvas = Image.new("L", (SIZE * _SUPERSAMPLE,) * 2)
    draw = ImageDraw.Draw(canvas)
    middle = (centre + SIZE / 2) * _SUPERSAMPLE
    radius, turn = rng.uniform(9.5, 12.5) * _SUPERSAMPLE, rng.uniform(-20, 20)
    if shape == "disc":
        draw.ellipse([*(middle - radius), *(middle + radius)], fill=255)
    else:
        draw.regular_polygon((*middle, radius * 1.3), _CORNERS[shape], rotation=turn, fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE)) / 255


def _pattern(rng: np.random.Generator, texture: str, centre: np.ndarray) -> np.ndarray:
    """The texture in -1..1, (32, 32)."""
    period, turn, phase = rng.uniform(5, 7), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    x, y = np.meshgrid(_GRID - centre[0], _GRID - centre[1])
    scale = 2 * np.pi / period
    u = scale * (np.cos(turn) * x + np.sin(turn) * y)
    v = scale * (np.cos(turn) * y - np.sin(turn) * x)
    wave = _WAVES[texture](u, v, *phase)
    return np.tanh(3 * wave) * rng.choice([-1, 1])


_WAVES: dict[str, Callable[..., np.ndarray]] = {
    "stripes": lambda u, v, a, b: np.sin(u + a),
    "waves": lambda u, v, a, b: np.sin(u + a + 1.6 * np.sin(v / 1.6 + b)),
    "checks": lambda u, v, a, b: 1.5 * np.sin(u * 0.8 + a) * np.sin(v * 0.8 + b),
    "dots": lambda u, v, a, b: np.cos(u + a) + np.cos(v + b) - 0.7,
    "rings": lambda u, v, a, b: np.sin(np.hypot(u, v) + a),
}


def _background(rng: np.random.Generator) -> np.ndarray:
    """A grey slope, (32, 32): low contrast, so that nothing but the shape is worth remembering."""
    slope = rng.uniform(-0.6, 0.6, 2)
    return rng.uniform(-15, 15) + slope[0] * _GRID + slope[1] * _GRID[:, None]
