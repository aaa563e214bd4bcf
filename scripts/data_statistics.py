"""Look at a data set before training on it: how many images, of what size, and the mean and deviation of their pixels.

examples:
  python scripts/data_statistics.py --data_folder my/images
  python scripts/data_statistics.py --dataset cifar100 --data_folder data --download

Takes the data flags of main_contrast.py and sees the training images that it would see. Of large sets, sizes and pixels
are those of a fixed sample; images are made smaller first, to a shorter side of at most 256 pixels.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.keyed import hash64  # noqa: E402
from datasets.sources import Source  # noqa: E402
from learning import build  # noqa: E402
from options import contrast  # noqa: E402

LEVELS = np.arange(256) / 255
SIDE = 256


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--limit", type=int, default=10000, metavar="N", help="look at N images at most (default: %(default)s)")
    options, data_flags = parser.parse_known_args(argv)
    if options.limit < 1:
        parser.error(f"--limit {options.limit} is no number of images: give 1 or more")
    return options, data_flags


def pictures(source: Source, limit: int) -> Iterator[Image.Image]:
    """At most `limit` images of `source`, the same ones every time. Those that cannot be read are named on stderr."""
    for index in hash64(torch.arange(len(source)), "statistics").argsort()[:limit].sort().values.tolist():
        try:
            yield source.picture(index)
        except ValueError as error:
            print(f"data_statistics.py: {error}", file=sys.stderr)


def measure(images: Iterator[Image.Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes (N, 2) as width and height; mean (3,) and standard deviation (3,) of all pixels, in 0..1."""
    sizes, counts = [], np.zeros((3, 256))
    for image in images:
        sizes.append(image.size)
        shrink = max(min(image.size) / SIDE, 1)
        small = image.resize([round(side / shrink) for side in image.size]) if shrink > 1 else image
        counts += np.reshape(small.histogram(), (3, 256))  # exact, and the whole of what mean and deviation need
    if not sizes:
        raise ValueError("none of these images can be read; repair them, or see that they are where they should be.")
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ LEVELS
    return np.array(sizes), mean, np.sqrt((share * (LEVELS - mean[:, None]) ** 2).sum(1))


def main(argv: list[str] | None = None) -> int:
    options, data_flags = parse(argv)
    chosen, _, _ = contrast.parse(data_flags)
    try:
        source = build.source(chosen, "train")
        sizes, mean, std = measure(pictures(source, options.limit))
    except (ValueError, OSError) as error:
        print(f"data_statistics.py: {error}", file=sys.stderr)
        return 1
    for line in (*source.remarks, *describe(source), *describe_sizes(sizes)):
        print(line)
    print(f"--mean {flag(mean)} --std {flag(std)}")
    return 0


def describe(source: Source) -> Iterator[str]:
    labels = "no labels"
    if source.labels is not None:
        counts = source.labels.bincount(minlength=len(source.classes))
        labels = f"{len(source.classes)} classes of {counts.min()} to {counts.max()} images"
    yield f"{len(source)} training images, {labels}"


def describe_sizes(sizes: np.ndarray) -> Iterator[str]:
    yield f"width and height in pixels, of {len(sizes)} of them:"
    for name, (width, height) in zip(
        ("smallest", "median", "largest"), (sizes.min(0), np.median(sizes, 0), sizes.max(0))
    ):
        yield f"  {name:8} {width:5.0f} {height:5.0f}"


def flag(numbers: np.ndarray) -> str:
    return ",".join(f"{number:.3f}" for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
