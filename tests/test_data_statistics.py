"""The script that looks at a data set: its numbers against numpy's, and flags that can be pasted."""

import numpy as np
import pytest
from PIL import Image

from options import contrast
from scripts import data_statistics


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for i in range(20):
        made.append(rng.integers(0, 40 * (i % 5 + 1), (8 + i, 10, 3), dtype=np.uint8))
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[-1]).save(path)
    (tmp_path / "val").mkdir()
    return tmp_path, made


def test_statistics(images, capsys):
    folder, made = images
    assert data_statistics.main(["--data_folder", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "20 training images, 2 classes of 10 to 10 images",
        "width and height in pixels, of 20 of them:",
    ]
    assert [line.split() for line in lines[2:5]] == [["smallest", "10", "8"], ["median", "10", "18"],
                                                     ["largest", "10", "27"]]  # fmt: skip
    options, _, _ = contrast.parse(lines[-1].split())
    pixels = np.concatenate([image.reshape(-1, 3) for image in made]) / 255
    assert options.mean == pytest.approx(pixels.mean(0), abs=6e-4)
    assert options.std == pytest.approx(pixels.std(0), abs=6e-4)


def test_limit_large_images_and_arrays(tmp_path):
    sizes, mean, std = data_statistics.measure(iter([Image.new("RGB", (1000, 500), (255, 0, 51))]))
    assert sizes.tolist() == [[1000, 500]] and mean == pytest.approx([1, 0, 0.2]) and std == pytest.approx([0] * 3)
    source = data_statistics.build.source(contrast.parse([])[0], "train")
    some = list(data_statistics.pictures(source, 7))
    assert len(some) == 7 and np.array_equal(some, list(data_statistics.pictures(source, 7)))


def test_mistakes_are_sentences(tmp_path, capsys):
    assert data_statistics.main(["--data_folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("data_statistics.py: no images in ")
    with pytest.raises(SystemExit):
        data_statistics.main(["--limit", "0"])


def test_all_images_that_cannot_be_read_are_named(images, capsys):
    root, _ = images
    for name in ("a/00.png", "b/03.png"):
        (root / "train" / name).write_text("no picture")
    assert data_statistics.main(["--data_folder", str(root)]) == 0
    said = capsys.readouterr()
    assert said.err.count("cannot be read as an image") == 2 and "of 18 of them" in said.out
    for path in (root / "train").rglob("*.png"):
        path.write_text("no picture")
    assert data_statistics.main(["--data_folder", str(root)]) == 1
    assert "none of these images can be read" in capsys.readouterr().err
