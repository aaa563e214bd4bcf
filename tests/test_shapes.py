"""The built-in shapes: the same bytes everywhere, balanced, and not to be solved by pixels or colours alone."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets import shapes


def ridge_accuracy(features: dict[str, np.ndarray], strength: float) -> float:
    """Top-1 on val, in percent, of ridge regression from train features (N, D) to one-hot labels, in closed form."""
    mean, std = features["train"].mean(0, dtype=np.float32), features["train"].std(0, dtype=np.float32) + 1e-6
    train, val = ((features[split].astype(np.float32) - mean) / std for split in ("train", "val"))
    targets = np.eye(len(shapes.CLASSES))[shapes.render("train")[1]]
    gram = train.T @ train + strength * len(train) * np.eye(train.shape[1], dtype=np.float32)
    scores = val @ np.linalg.solve(gram, train.T @ (targets - targets.mean(0)))
    return 100 * np.mean(scores.argmax(1) == shapes.render("val")[1])


def digest() -> str:
    return hashlib.sha256(shapes.render("val")[0].tobytes()).hexdigest()


@pytest.mark.parametrize("split", ["train", "val"])
def test_layout(split):
    images, labels = shapes.render(split)
    assert images.shape == (shapes.COUNTS[split], 32, 32, 3) and images.dtype == np.uint8
    assert labels.shape == (shapes.COUNTS[split],) and labels.dtype == np.int64
    assert (np.bincount(labels) == shapes.COUNTS[split] // len(shapes.CLASSES)).all()
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_same_bytes_in_another_process():
    code = "from tests.test_shapes import digest; print(digest())"
    root = Path(__file__).parent.parent
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_every_picture_is_its_own():
    pictures = {image.tobytes() for split in shapes.COUNTS for image in shapes.render(split)[0]}
    assert len(pictures) == sum(shapes.COUNTS.values())


def test_published_mean_and_std():
    pixels = shapes.render("train")[0] / 255
    assert np.allclose(pixels.mean((0, 1, 2)), shapes.MEAN, atol=1e-3)
    assert np.allclose(np.sqrt(pixels.var((0, 1, 2)).mean()), shapes.STD, atol=1e-3)


def test_pixels_do_not_tell_the_class():
    pixels = {split: shapes.render(split)[0].reshape(shapes.COUNTS[split], -1) for split in shapes.COUNTS}
    assert ridge_accuracy(pixels, strength=1.0) < 40


def test_colours_do_not_tell_the_class():
    colours = {split: shapes.render(split)[0].mean((1, 2)) for split in shapes.COUNTS}
    assert ridge_accuracy(colours, strength=1e-3) < 20


def test_unknown_split():
    with pytest.raises(ValueError, match="train, val"):
        shapes.render("test")
