"""Put runs side by side in the terminal: the options in which they differ, and what was measured, with the difference
to the first run.

example: python scripts/compare.py save/A save/B
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from visualization.runs import Run, differing, measures, read_runs  # noqa: E402


def options(runs: list[Run]) -> Iterator[list[str]]:
    yield ["option", *(run.label.replace("\n", "") for run in runs)]
    for name, values in differing(runs).items():
        yield [name, *map(str, values)]


def metrics(runs: list[Run]) -> Iterator[list[str]]:
    found = [measures(run) for run in runs]
    yield ["measure", *(run.label.replace("\n", "") for run in runs)]
    for name in dict.fromkeys(name for values in found for name in values):
        first = found[0].get(name)
        yield [name, *(_cell(values.get(name), first if values is not found[0] else None) for values in found)]


def _cell(value: float | None, first: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if first is None else f"{value:.4g} ({value - first:+.4g})"


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, such as ./save/NAME")
    asked = parser.parse_args(argv)
    try:
        if len(asked.runs) < 2:
            raise ValueError("one run has nothing to be compared with: name two or more")
        runs = read_runs(asked.runs, log_only=True)
        print(table([*options(runs)]), table([*metrics(runs)]), sep="\n\n")
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
