"""Train several methods on the same data for the same time, and put what they learned into one table.

examples:
  python scripts/compare_methods.py --methods MoCov2,SimCLR,BYOL --seeds 0,1,2 -o methods.md
  python scripts/compare_methods.py --epochs 50 --linear -- --data_folder cifar10.npz --width 0.25 --amp

Flags behind -- are those of main_contrast.py; what they say of data, network and machine the evaluations are told too.
Everything else is as the method's preset has it. The same line goes on where it was stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from options import contrast, linear  # noqa: E402
from options.presets import METHODS  # noqa: E402

GROUPS = ("data", "processes")  # of options that both programs understand alike, and more of them:
ALIKE = [field.name for field in dataclasses.fields(linear.LinearOptions) if field.metadata["group"] in GROUPS]
ALIKE += ["batch_size", "amp", "model_path", "tb_path"]
NETWORK = ("arch", "width", "head", "feat_dim", "modal", "view")  # what a checkpoint tells by itself
COLUMNS = ("untrained", "trained", "gain", "head", "linear", "s/epoch")
EXPLANATION = """Top-1 accuracy in %, mean over seeds (each of them): k-NN of the backbone's features untrained and
trained, of the trained head's output, and a linear probe on the backbone after its last epoch. With seed"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the flags behind --."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, every = parser.add_argument, ",".join(name for name in METHODS if name != "Customize")
    add("--methods", default=every, metavar="A,B", help="default: %(default)s")
    add("--seeds", default="0", metavar="N,N", help="default: %(default)s")
    add("--epochs", metavar="N", help="of training; default: the data set's")
    add("--linear", nargs="?", const="1", metavar="LR", help="train a linear probe too; its learning rate, default: 1")
    add("-o", "--output", type=Path, metavar="FILE.md", help="write the table there too; its folder must exist")
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def commands(method: str, seed: str, asked: argparse.Namespace, flags: list[str]) -> dict[Path, list[str]]:
    """Command lines by the folder they write to: untrained k-NN, training, k-NN and, if asked for, linear probe."""
    typed = ["--method", method, *flags, *(["--epochs", asked.epochs] if asked.epochs else [])]
    opt, sources, _ = contrast.parse(typed)  # exits with a sentence when the flags do not fit the method
    ours = [name for name in ("seed", "name", "resume", "stem") if sources[name] == "command line"]
    if ours or opt.method != method:
        raise ValueError(f"--{(ours or ['method'])[0]} is chosen for every run: leave it out behind --")
    run = Path(opt.model_path) / f"{method}-{hashlib.sha256(repr(typed).encode()).hexdigest()[:6]}-seed{seed}"
    evaluate = ["main_linear.py", *as_typed(opt, sources, ALIKE), "--eval"]
    probe = ["--ckpt", str(run), "--cache_features", "--learning_rate", asked.linear, "--resume", "auto"]
    lines = {
        f"{run}_untrained": [*evaluate, "knn", "--method", method, *as_typed(opt, sources, NETWORK)],
        f"{run}": ["main_contrast.py", *typed, "--resume", "auto"],
        f"{run}_knn": [*evaluate, "knn", "--ckpt", str(run)],
        **({f"{run}_linear": [*evaluate, "linear", *probe]} if asked.linear else {}),
    }
    return {Path(folder): [*line, "--seed", seed, "--name", Path(folder).name] for folder, line in lines.items()}


def as_typed(opt: contrast.ContrastOptions, sources: dict[str, str], names: Iterable[str]) -> list[str]:
    """Those of the options that were typed, as flags."""
    flags = []
    for name in (name for name in names if sources.get(name) == "command line"):
        value = getattr(opt, name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", shown]
    return flags


def launch(line: list[str]) -> bool:
    """Run a program of this checkout and tell whether it succeeded."""
    program = subprocess.Popen([sys.executable, ROOT / line[0], *line[1:]])
    try:
        return program.wait() == 0
    except KeyboardInterrupt:  # the program hears it too, and saves
        program.wait()
        raise


def measured(folders: list[Path]) -> dict[str, float]:
    """The numbers in what the `commands` of one run left."""
    untrained, run, *evaluated = folders
    before, knn, *probe = (json.loads((folder / "results.json").read_text()) for folder in (untrained, *evaluated))
    before, after = (found["knn"]["backbone"]["top1"] for found in (before, knn))
    values = {"untrained": before, "trained": after, "gain": after - before, "head": knn["knn"]["head"]["top1"]}
    if probe:
        values["linear"] = probe[0]["linear"]["last"]["top1"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speeds = [record["images_per_second"] for record in log if record["kind"] == "step"]
    steps = next(record["step"] / record["epoch"] for record in log if record["kind"] == "epoch")
    images = steps * json.loads((run / "options.json").read_text())["values"]["batch_size"]
    return values | ({"s/epoch": images / statistics.median(speeds)} if speeds else {})


def cell(values: list[float]) -> str:
    each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{each}" if values else "–"


def compare(argv: list[str]) -> bool:
    """Run what is not there yet, print the table, and tell whether everything succeeded."""
    asked, flags = parse(argv)
    methods, seeds = asked.methods.split(","), asked.seeds.split(",")
    plan = {(method, seed): commands(method, seed, asked, flags) for method in methods for seed in seeds}
    found = {}
    for key, lines in plan.items():  # a command that fails ends its run, and the others go on
        if all((folder / "results.json").exists() or launch(line) for folder, line in lines.items()):
            found[key] = measured([*lines])
    names = ("method", "seeds", *COLUMNS)
    page = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for method in methods:
        runs = {seed: found[method, seed] for seed in seeds if (method, seed) in found}
        cells = (cell([values[name] for values in runs.values() if name in values]) for name in COLUMNS)
        page.append(f"| {' | '.join([method, ', '.join(runs) or 'failed', *cells])} |")
    lines = [shlex.join(["python", *line]) for method in methods for line in plan[method, seeds[0]].values()]
    page += ["", f"{EXPLANATION} {seeds[0]}:", "", "```", *lines, "```", ""]
    print("", *page, sep="\n")
    if asked.output:
        asked.output.write_text("\n".join(page))
    return len(found) == len(plan)


if __name__ == "__main__":
    try:
        sys.exit(not compare(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("Stopped; the same line goes on.")
    except (ValueError, OSError) as error:
        sys.exit(f"compare_methods.py: {error}")
