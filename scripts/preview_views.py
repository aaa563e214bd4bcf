"""Draw the views that training will see of some images, with everything that was drawn by lot for them.

examples:
  python scripts/preview_views.py --data_folder my/images --seed 0
  python scripts/preview_views.py --data_folder my/images --seed 0 --method PIRL --epoch 3 --indices 5,17 -o pirl.png

Takes the flags of main_contrast.py. The first column is the picture with the box of every crop; views.json, beside
views.png, has the numbers in full. Views hang on seed, epoch and sample alone, not on batches, processes or workers.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.loader import TrainLoader  # noqa: E402
from datasets.sources import Source  # noqa: E402
from learning import build, parallel  # noqa: E402
from options import contrast  # noqa: E402
from visualization import figures  # noqa: E402

SAID = {  # in a caption, of what a view is told to be made by
    "crop": lambda box: "{3} x {2} at {1}, {0}".format(*box),
    "flip": lambda flipped: "flipped" * flipped,
    "randaugment": lambda done: "RandAugment",
    "jitter": lambda factors: ", ".join(f"{name}\N{NO-BREAK SPACE}{factor:.2f}" for name, factor in factors.items()),
    "gray": lambda done: "grey",
    "blur": "blur {:.2f}".format,
    "solarize": lambda done: "solarised",
    "pieces": lambda pieces: f"{len(pieces)} pieces, each as the .json says",
}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the flags of main_contrast.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("views.png"), help=".png, .pdf or .svg (default: %(default)s)")
    add("--samples", type=int, default=8, metavar="N", help="the first N of the epoch (default: %(default)s)")
    add("--indices", type=numbers, metavar="I,J", help="these images instead, counted from 0 as the data list them")
    add("--epoch", type=int, default=1, metavar="E", help="counted from 1, as in log.txt (default: %(default)s)")
    options, flags = parser.parse_known_args(argv)
    if min(options.samples, options.epoch) < 1:
        parser.error("--samples and --epoch count from 1: give 1 or more")
    return options, flags


def describe(loader: TrainLoader, data: Source, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Per sample of the batch: its number, its file and class if it has them, and what was drawn for every view."""
    told = []
    for index, key in zip(batch["index"].tolist(), batch["key_draw"].tolist()):
        width, height = data.picture(index).size
        about = {
            "file": None if data.in_memory else data.images[index],
            "class": None if data.labels is None else data.classes[data.labels[index]],
        }
        told.append({"index": index, **about, "views": loader.recipe.told(key, height, width)})
    return told


@figures.styled
def draw(data: Source, views: dict[str, Tensor], told: list[dict[str, Any]]) -> Figure:
    """A row per sample: the picture, then its views, RGB in 0..1 (n, 3, H, W), those of a jigsaw (n, 9, 3, h, w)."""
    views = {name: _joined(view).clamp(0, 1).permute(0, 2, 3, 1).numpy() for name, view in views.items()}
    widths = [1, *(view.shape[2] / view.shape[1] for view in views.values())]
    figure = Figure(figsize=(1.75 * sum(widths), 2.25 * len(told)), layout="constrained")
    grid = figure.subplots(len(told), len(widths), squeeze=False, width_ratios=widths)
    for number, (row, sample) in enumerate(zip(grid, told)):
        _tile(row[0], data.picture(sample["index"]), f"image {sample['index']}\n{sample['class'] or ''}", figures.GREY)
        for axes, color, (view, drawn) in zip(row[1:], figures.PALETTE * len(views), sample["views"].items()):
            words = filter(None, (SAID[name](value) for name, value in drawn.items()))
            _tile(axes, views[view][number], fill(", ".join(words), 30), color)
            top, left, height, width = drawn["crop"]
            box = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=color, clip_on=False)
            row[0].add_patch(box)
    for axes, title in zip(grid[0], ["picture", *views]):
        axes.set_title(title, loc="center")
    return figure


def _joined(views: Tensor) -> Tensor:
    """The pieces of jigsaws (n, 9, 3, h, w) in their grid, with white between them; others as they are."""
    if views.ndim == 4:
        return views
    rows = pad(views, [0, 2, 0, 2], value=1).unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5)
    return rows.flatten(4).flatten(2, 3)[:, :, :-2, :-2]


def _tile(axes: Axes, picture: Any, below: str, color: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(below, fontsize=6.5)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=1.5)


def preview(options: argparse.Namespace, flags: list[str]) -> None:
    opt, origins, _ = contrast.parse(flags)
    data = build.source(opt, "train")
    opt, rules = build.resolve(opt, origins, n_data=len(data))
    if not all(0 <= index < len(data) for index in options.indices or []):
        raise ValueError(f"--indices must lie between 0 and {len(data) - 1}, as there are {len(data)} images")
    opt = dataclasses.replace(opt, batch_size=1, accumulate=1)  # views do not hang on them, but more needs more images
    loader = build.train_loader(opt, data, parallel.device(opt.device, opt.gpu))
    loader.set_epoch(options.epoch - 1)
    batch = loader.of(torch.tensor(options.indices or loader.sampler.order()[: options.samples].tolist()))
    told = describe(loader, data, batch)
    views = {name: loader.recipe.colours.shown(batch[name]).cpu() for name in loader.recipe.views}
    figures.save(draw(data, views, told), options.output)
    beside = options.output.with_suffix(".json")
    beside.write_text(json.dumps({"seed": opt.seed, "epoch": options.epoch, "samples": told}, indent=1))
    print(f"{options.output}: {len(told)} of {len(data)} images in epoch {options.epoch}; the numbers are in {beside}")
    if "seed" in rules:
        print(f"note: without --seed a run draws its own; with --seed {opt.seed} it sees these views")


def main(argv: list[str] | None = None) -> int:
    try:
        preview(*parse(argv))
    except (ValueError, OSError) as error:
        print(f"preview_views.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
