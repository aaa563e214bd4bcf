"""One self-contained HTML page about a run or several: options, results, curves, scores over time, the paper's figures,
and pictures: what training sees, what the encoder takes for similar, a map of its features. It opens from disk.

examples:
  python scripts/report.py save/A -o report.html
  python scripts/report.py save/A save/B --labels MoCo MoCo+FT -o report.html
  python scripts/report.py reference/scores --no_pictures      # score_001.npy, ... of the published program
"""

import argparse
import dataclasses
import io
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from datasets.colours import colours  # noqa: E402
from datasets.sources import Source  # noqa: E402
from learning import build, checkpoint  # noqa: E402
from learning.evaluations.features import extract  # noqa: E402
from models.encoder import Encoder  # noqa: E402
from options import base  # noqa: E402
from options.contrast import ContrastOptions  # noqa: E402
from visualization.report import Pictures, page  # noqa: E402
from visualization.runs import read_runs  # noqa: E402

SAMPLES, NEIGHBOURS, IMAGES = 6, 6, 512  # rows and columns of a sheet; images on the map
THUMB = 56  # pixels


def pictures(folder: Path) -> Pictures | str:
    """Of the newest checkpoint of a run, or the sentence that says why there are none."""
    try:
        file, _ = checkpoint.locate(folder)
        encoder, values, _ = build.load_encoder(str(file), False)
        here = {"num_workers": 0, "batch_size": 64, "accumulate": 1, "amp": "off", "download": False}
        known = {field.name for field in dataclasses.fields(ContrastOptions)}
        told = {name: value for name, value in (values | here).items() if name in known}
        opt, _ = base.merge(ContrastOptions, [("checkpoint", told)])
        data = build.source(opt, "train")
        with torch.inference_mode():
            return _pictures(opt, data, encoder)
    except (ValueError, OSError) as error:
        return f"no pictures: {error}"


def _pictures(opt: ContrastOptions, data: Source, encoder: Encoder) -> Pictures:
    some = data.part(torch.linspace(0, len(data) - 1, min(IMAGES, len(data))).long())
    if some.labels is None:
        some = dataclasses.replace(some, labels=torch.zeros(len(some), dtype=torch.int64), classes=("image",))
    seen = build.colours(dataclasses.asdict(opt), data)
    features, labels = extract(encoder.features, build.eval_loader(opt, some, torch.device("cpu"), seen))
    features = F.normalize(features, dim=1)
    queries = torch.linspace(0, len(some) - 1, min(SAMPLES, len(some))).long()
    nearest = (features[queries] @ features.T).topk(min(NEIGHBOURS + 1, len(some))).indices  # the first is the query
    found = [_originals(opt, some, column) for column in nearest.T]
    left, sizes, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    points = (left * sizes)[:, :2].numpy()
    return Pictures((_sheet(_views(opt, data)), _sheet(found)), points, labels.tolist(), some.classes)


def _views(opt: ContrastOptions, data: Source) -> list[Tensor]:
    """The first images of training's first epoch and, view by view, what it makes of them; all in RGB."""
    opt = dataclasses.replace(opt, batch_size=min(SAMPLES, len(data)), modal="RGB")
    loader = build.train_loader(opt, data, torch.device("cpu"))
    batch = loader.of(loader.sampler.order()[: opt.batch_size])
    whole = {name: x for name, x in batch.items() if x.ndim == 4}  # a jigsaw's pieces are no picture
    return [_originals(opt, data, batch["index"]), *(_thumbs(x, data) for x in whole.values())]


def _originals(opt: ContrastOptions, data: Source, index: Tensor) -> Tensor:
    plain = colours("RGB", "", data.mean, data.std)
    batches = build.eval_loader(opt, data.part(index), torch.device("cpu"), plain)
    return _thumbs(torch.cat([batch["image"] for batch in batches]), data)


def _thumbs(images: Tensor, data: Source) -> Tensor:
    """Normalised (N, 3, H, W) -> 0..1 (N, THUMB, THUMB, 3)."""
    shown = colours("RGB", "", data.mean, data.std).shown(images)
    sized = F.interpolate(shown, size=(THUMB, THUMB), mode="bilinear", antialias=True)
    return sized.clamp(0, 1).permute(0, 2, 3, 1)


def _sheet(columns: list[Tensor]) -> bytes:
    """A picture with these columns of thumbnails; the first, the image in question, stands a little apart."""
    apart = [*[4] * (len(columns) - 1), 0]
    apart[0] = 14
    padded = [F.pad(x, (0, 1), value=1.0) for x in columns]  # opaque
    rows = torch.cat([F.pad(x, (0, 0, 0, gap, 0, 4)) for x, gap in zip(padded, apart)], dim=2)
    pixels = (rows.flatten(0, 1) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "webp", quality=90)
    return file.getvalue()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as ./save/NAME, or one of score files")
    add("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    add("--labels", nargs="+", metavar="LABEL", help="names, one per run (default: folder names)")
    add("--no_pictures", action="store_true", help="leave out what needs the images and the encoder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = parse(argv)
    try:
        runs = read_runs(asked.runs, labels=asked.labels, log_only=True)
        found = [] if asked.no_pictures else [pictures(run.folder) for run in runs]
        command = shlex.join(["python", "scripts/report.py", *(sys.argv[1:] if argv is None else argv)])
        asked.output.write_text(page(runs, found, command), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(asked.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
