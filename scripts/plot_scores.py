"""Draw the score statistics that `--save_score` wrote into run folders.

examples:
  python scripts/plot_scores.py save/A -o overview.png                   # one run: overview
  python scripts/plot_scores.py save/A save/B --labels MoCo MoCo+FT      # several: their statistics compared
  python scripts/plot_scores.py save/A save/B --figure all -o figures/scores.pdf
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from visualization import figures  # noqa: E402
from visualization.runs import read_runs  # noqa: E402

FIGURES = {
    "overview": figures.overview,
    "comparison": figures.compare,
    "negative_variance": lambda runs, **look: figures.compare(runs, "negative_variance", **look),
    "negative_mean": lambda runs, **look: figures.compare(runs, "negative_mean", **look),
    "positive_mean": lambda runs, **look: figures.compare(runs, "positive_mean", **look),
    "grid": figures.grid,
    "waterfall": figures.waterfall,
    "distributions": lambda runs, smooth: figures.distributions(runs),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as ./save/NAME")
    add("-o", "--output", type=Path, default=Path("scores.png"), help=".png, .pdf or .svg (default: %(default)s)")
    add("--figure", choices=[*FIGURES, "all"], help="default: overview of one run, comparison of several")
    add("--labels", nargs="+", metavar="LABEL", help="names for the legend, one per run (default: folder names)")
    add("--smooth", type=int, metavar="STEPS", help="draw a moving average over the raw lines (default: raw only)")
    options = parser.parse_args(argv)
    if options.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"cannot write {options.output}: end its name in .png, .pdf or .svg")
    if options.smooth is not None and options.smooth < 1:
        parser.error(f"--smooth {options.smooth} is no number of steps: give 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    output, chosen = options.output, options.figure or ("overview" if len(options.runs) == 1 else "comparison")
    paths = {chosen: output}
    try:
        runs = read_runs(options.runs, labels=options.labels)
        if chosen == "all":
            drawn = [name for name in FIGURES if name not in figures.TITLES or figures.recorded(runs, [name])]
            paths = {name: output.with_stem(f"{output.stem}_{name}") for name in drawn}
        for name, path in paths.items():
            figures.save(FIGURES[name](runs, smooth=options.smooth), path)
            print(path)
    except (ValueError, OSError) as error:
        print(f"plot_scores.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
