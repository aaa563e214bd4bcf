"""Draw the views that training will see of some images, with everything that was drawn by lot for them.

examples:
  python scripts/preview_views.py --data_folder my/images --seed 0
  python scripts/preview_views.py --data_folder my/images --seed 0 --method PIRL --epoch 3 --indices 5,17 -o pirl.png

Takes the flags of main_contrast.py. The first column is the picture with the box of every crop; views.json, beside
views.png, has the numbers in full. Views hang on seed, epoch and sample alone, not on batches, processes or workers.
"""

import argparse
import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.loader import TrainLoader  # noqa: E402
from datasets.sources import Source  # noqa: E402
from learning import build, parallel  # noqa: E402
from options import contrast  # noqa: E402
from visualization import figures  # noqa: E402

GAP = 2  # pixels between the pieces of a jigsaw
SAID = {
    "crop": lambda box: "{3} x {2} at {1}, {0}".format(*box),
    "flip": lambda flipped: "flipped" * flipped,
    "randaugment": lambda done: "RandAugment",
    "jitter": lambda factors: ", ".join(f"{name}\N{NO-BREAK SPACE}{factor:.2f}" for name, factor in factors.items()),
    "gray": lambda done: "grey",
    "blur": "blur {:.2f}".format,
    "solarize": lambda done: "solarised",
    "pieces": lambda pieces: f"{len(pieces)} pieces, each as the .json says",
}


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the flags of main_contrast.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("views.png"), help=".png, .pdf or .svg (default: %(default)s)")
    add("--samples", type=int, default=8, metavar="N", help="the first N of the epoch (default: %(default)s)")
    add("--indices", metavar="I,J", help="these images instead, numbered from 0 as the data list them")
    add("--epoch", type=int, default=1, metavar="E", help="counted from 1, as in log.txt (default: %(default)s)")
    options, flags = parser.parse_known_args(argv)
    if options.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"cannot write {options.output}: end its name in .png, .pdf or .svg")
    if min(options.samples, options.epoch) < 1:
        parser.error("--samples and --epoch count from 1: give 1 or more")
    return options, flags


def chosen(options: argparse.Namespace, loader: TrainLoader) -> Tensor:
    """Which images to show. ValueError for what is no list of their numbers."""
    if options.indices is None:
        return loader.sampler.order()[: options.samples]
    numbers = [int(part) for part in options.indices.split(",") if part.strip().isdecimal()]
    if len(numbers) <= options.indices.count(",") or max(numbers) >= loader.sampler.n:
        raise ValueError(
            f"--indices {options.indices} are not numbers of images: give some of 0 to {loader.sampler.n - 1} with "
            "commas between them"
        )
    return torch.tensor(numbers)


def describe(loader: TrainLoader, data: Source, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Per sample of the batch: its number, its file and label if it has them, and what was drawn for every view."""
    told = []
    for index, key in zip(batch["index"].tolist(), batch["key_draw"].tolist()):
        file = {} if data.in_memory else {"file": data.images[index]}
        label = {} if data.labels is None else {"label": data.classes[data.labels[index]]}
        width, height = data.picture(index).size
        told.append({"index": index} | file | label | {"views": loader.recipe.told(key, height, width)})
    return told


def caption(drawn: dict[str, Any]) -> str:
    """What became of the picture, in the order in which it was done."""
    return fill(", ".join(filter(None, (SAID[name](value) for name, value in drawn.items()))), 30)


def laid_out(view: Tensor) -> np.ndarray:
    """RGB (3, H, W) as it is, or the pieces (9, 3, h, w) of a jigsaw in their grid on white; as (H, W, 3)."""
    if view.ndim == 4:
        rows = torch.nn.functional.pad(view, [0, GAP, 0, GAP], value=1).unflatten(0, (3, 3))
        view = rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[:, :-GAP, :-GAP]
    return view.clamp(0, 1).permute(1, 2, 0).numpy()


@figures.styled
def draw(data: Source, views: dict[str, Tensor], told: list[dict[str, Any]]) -> Figure:
    """A row per sample: the picture, then its views, RGB in 0..1."""
    shown = {name: [laid_out(view) for view in of_all] for name, of_all in views.items()}
    widths = [1.0, *(of_all[0].shape[1] / of_all[0].shape[0] for of_all in shown.values())]
    figure = Figure(figsize=(1.75 * sum(widths), 2.25 * len(told)), layout="constrained")
    grid = figure.subplots(len(told), len(widths), squeeze=False, width_ratios=widths)
    colors = dict(zip(shown, (figures.PALETTE * len(shown))))
    for number, (row, sample) in enumerate(zip(grid, told)):
        name = str(sample.get("label", ""))
        _tile(row[0], data.picture(sample["index"]), f"image {sample['index']}\n{name}", figures.GREY)
        for axes, (view, drawn) in zip(row[1:], sample["views"].items()):
            top, left, height, width = drawn["crop"]
            row[0].add_patch(
                Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=colors[view], clip_on=False)
            )
            _tile(axes, shown[view][number], caption(drawn), colors[view])
    for axes, title in zip(grid[0], ["picture", *shown]):
        axes.set_title(title, loc="center")
    return figure


def _tile(axes: Axes, picture: Any, below: str, color: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(below, fontsize=6.5)
    axes.xaxis.label.set_verticalalignment("top")
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=1.5)


def preview(options: argparse.Namespace, flags: list[str]) -> None:
    opt, origins, _ = contrast.parse(flags)
    data = build.source(opt, "train")
    opt, rules = build.resolve(opt, origins, n_data=len(data))
    loader = build.train_loader(opt, data, parallel.device(opt.device, opt.gpu))
    loader.set_epoch(options.epoch - 1)
    batch = loader.of(chosen(options, loader))
    views = {name: loader.recipe.colours.shown(batch[name]).cpu() for name in loader.recipe.views}
    told = describe(loader, data, batch)
    figures.save(draw(data, views, told), options.output)
    numbers = options.output.with_suffix(".json")
    numbers.write_text(json.dumps({"seed": opt.seed, "epoch": options.epoch, "samples": told}, indent=1))
    print(f"{options.output}: {len(told)} of {len(data)} images in epoch {options.epoch}; the numbers are in {numbers}")
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
