"""Say of training runs what their logs show, what to compare it with, what is wrong, and what to do about it.

examples:
  python scripts/doctor.py save/mine       # a run that is over, or still trains
  python scripts/doctor.py save/A save/B
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from learning import doctor  # noqa: E402
from options import contrast  # noqa: E402


def examine(folder: Path) -> doctor.Case:
    """The case of a run folder; ValueError if it is none. How many images there are is known within a batch."""
    try:
        values = json.loads((folder / "options.json").read_text())["values"]
        names = [field.name for field in dataclasses.fields(contrast.ContrastOptions) if field.name in values]
        opt = contrast.ContrastOptions(**{name: values[name] for name in ["warmup_epochs", *names]})
        processes = json.loads((folder / "environment.json").read_text())["processes"]
        case = doctor.Case(opt, contrast.usual(opt), math.inf, processes)
        case.read(folder / "log.jsonl")
    except (OSError, ValueError, KeyError) as error:
        what = error if isinstance(error, OSError) else repr(error)
        sentence = f"{folder} is no run of main_contrast.py, or damaged ({what}): give the folder of one"
        raise ValueError(sentence) from error
    for row in case.epochs[-1:]:
        case.images = (row["step"] // row["epoch"] + 1) * opt.batch_size
    return case


def report(folder: Path) -> Iterator[str]:
    """Lines about a run: numbers, then findings."""
    case = examine(folder)
    yield f"{folder}: {case.opt.method} on {case.opt.dataset}, {len(case.epochs)} of {case.opt.epochs} epochs"
    yield from (f"  {line}" for line in doctor.symptoms(case))
    found = [*doctor.at_start(case), *doctor.from_log(case)]
    yield from (f"  doctor: {finding}" for finding in found)
    if not case.settled:
        yield f"  {'nothing wrong found yet: ' * _well(found)}most takes 3 epochs after warm-up to tell"
    elif _well(found):
        yield "  nothing wrong found"


def _well(found: list[doctor.Finding]) -> bool:
    return all(finding.well for finding in found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as ./save/NAME")
    try:
        for folder in parser.parse_args(argv).runs:
            print(*report(folder), sep="\n")
    except ValueError as error:
        print(f"doctor.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
