"""The built-in data set: 32 x 32 pictures of one textured shape each, drawn on the spot, nothing to download.

A class is a texture family times a coarse shape. Place, size, direction, phase and polarity vary within every class,
and the colours are the same for all. Measured on these very pictures, top-1 on val in percent, chance 10:

    15       ridge regression on raw pixels
    15       ridge regression on the mean colour of each picture
    24 - 32  k-NN (k = 200, cosine, T = .1) on an untrained ResNet-18 of base width 16 with a 3x3 stem: eval mode, four
             random initialisations; 18 when batch norm uses the statistics of batches of 500
    28 - 38  logistic regression on the same features; 19 with batch statistics
    100      the same network trained with labels on random crops for 6 epochs, batches of 64
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
COUNTS = {"train": 5000, "val": 2000}
TEXTURES = ("stripes", "waves", "checks", "dots", "rings")
SHAPES = ("disc", "cross")
CLASSES: tuple[str, ...] = tuple(f"{texture}-{shape}" for texture in TEXTURES for shape in SHAPES)
MEAN = (0.518, 0.518, 0.518)
STD = (0.150, 0.150, 0.150)  # of all channels together: blue alone has .03, and would blow up what colour jitter does

# One pair of colours for all: were each picture given its own, colour alone would tell the pictures apart and a
# contrastive learner would look no further. The ground is their mean, so that the mean colour says nothing of the area.
_DARK, _LIGHT, _GROUND = np.array([[24, 74, 140], [240, 190, 124], [132, 132, 132]])
_SUPERSAMPLE = 4
_ARM = 0.4  # half the width of a cross's arm; with it, a cross covers about the area of a disc of radius 1
_CROSS = np.array(
    [(_ARM, -1.2), (_ARM, -_ARM), (1.2, -_ARM), (1.2, _ARM), (_ARM, _ARM), (_ARM, 1.2)]
    + [(-_ARM, 1.2), (-_ARM, _ARM), (-1.2, _ARM), (-1.2, -_ARM), (-_ARM, -_ARM), (-_ARM, -1.2)]
)
_PIXELS = np.arange(SIZE) + 0.5 - SIZE / 2

# Texture -> height field of the rotated coordinates u, v (radians, one period = 2 pi) and of two phases.
_HEIGHTS: dict[str, Callable[..., np.ndarray]] = {
    "stripes": lambda u, v, a, b: np.sin(u + a),
    "waves": lambda u, v, a, b: np.sin(u + a + 1.6 * np.sin(v / 1.6 + b)),
    "checks": lambda u, v, a, b: 1.5 * np.sin(0.8 * u + a) * np.sin(0.8 * v + b),
    "dots": lambda u, v, a, b: np.cos(u + a) + np.cos(v + b) - 0.5,
    "rings": lambda u, v, a, b: np.sin(np.hypot(u, v) + a),
}


@cache
def render(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a whole split ("train" or "val"), the same at every call: all 7,000 pictures in under two seconds.

    Returns pictures uint8 (N, 32, 32, 3) and labels int64 (N,), indices into CLASSES, both read-only because the
    cache hands them to every caller. N is 5,000 or 2,000, the classes take turns. Raises ValueError for other splits.
    """
    if split not in COUNTS:
        raise ValueError(f"The built-in shapes have no split '{split}': choose one of {', '.join(COUNTS)}.")
    labels = np.arange(COUNTS[split], dtype=np.int64) % len(CLASSES)
    images = np.stack([_draw(split, index, label) for index, label in enumerate(labels.tolist())])
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def _draw(split: str, index: int, label: int) -> np.ndarray:
    """One picture, uint8 (32, 32, 3), from a generator of its own."""
    rng = np.random.default_rng((list(COUNTS).index(split), index))
    centre = rng.uniform(-4, 4, 2)
    mask = _mask(rng, SHAPES[label % len(SHAPES)], centre)[..., None]
    blend = _texture(rng, TEXTURES[label // len(SHAPES)], centre)[..., None]
    picture = mask * (_DARK + blend * (_LIGHT - _DARK)) + (1 - mask) * (_GROUND + _shade(rng)[..., None])
    picture += rng.uniform(-8, 8, (SIZE, SIZE, 1))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _mask(rng: np.random.Generator, shape: str, centre: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1, (32, 32)."""
    canvas = Image.new("L", (SIZE * _SUPERSAMPLE, SIZE * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    middle = (centre + SIZE / 2) * _SUPERSAMPLE
    radius, turn = rng.uniform(9, 13) * _SUPERSAMPLE, rng.uniform(0, 2 * np.pi)
    if shape == "disc":
        draw.ellipse([*(middle - radius), *(middle + radius)], fill=255)
    else:
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        draw.polygon((radius * _CROSS @ rotation + middle).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE)) / 255


def _texture(rng: np.random.Generator, texture: str, centre: np.ndarray) -> np.ndarray:
    """Where the texture is light (1) and dark (0), soft at its edges, (32, 32)."""
    period, turn, phases = rng.uniform(5, 7), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    x, y = np.meshgrid(_PIXELS - centre[0], _PIXELS - centre[1])
    u = 2 * np.pi / period * (np.cos(turn) * x + np.sin(turn) * y)
    v = 2 * np.pi / period * (np.cos(turn) * y - np.sin(turn) * x)
    height = np.tanh(3 * _HEIGHTS[texture](u, v, *phases))
    return 0.5 + 0.5 * height * rng.choice([-1, 1])


def _shade(rng: np.random.Generator) -> np.ndarray:
    """The background's faint slope in grey levels, (32, 32): nothing worth remembering a picture by."""
    slope_x, slope_y = rng.uniform(-0.5, 0.5, 2)
    return rng.uniform(-10, 10) + slope_x * _PIXELS + slope_y * _PIXELS[:, None]
