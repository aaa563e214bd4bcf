"""Kill small training runs at random moments, start the same line again until they are complete, and compare hashes.

example:
  python scripts/soak.py --kills 20 --methods MoCov2,InsDis,SimCLR --seed 0

Every way to launch meets every number of loader workers and every method; the kills are spread over these cells. What
a killed run leaves in the end is to be, to the last bit, what an uninterrupted one of as many processes leaves:
weights, memory, optimizer, position, scores, log and TensorBoard scalars, times apart. Prints a table in Markdown; the
exit status is 1 if anything differs, and then the runs stay. Other flags go to main_contrast.py. Needs tensorboard.
"""

import argparse
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from datasets import shapes  # noqa: E402
from learning import checkpoint  # noqa: E402  (before tensorboard: sets what protobuf must see)
from options.presets import METHODS  # noqa: E402

PLAIN, SPAWN, TORCHRUN = LAUNCHES = "plain", "--nprocs 2", "torchrun 2"
GENTLE, SHARE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), 0.3  # of the kills; the others are SIGKILL
SMALL = """--dataset folder --arch resnet18 --width 0.125 --stem small --input_res 16 --feat_dim 16 --batch_size 16
    --queue_size 64 --epochs 2 --warmup_epochs 0 --save_every_steps 5 --print_freq 1 --save_score --amp off --seed 3
    --device cpu --name run --resume auto --ft_pos extrapolate --ft_pos_granularity sample"""
FT_NEGATIVE = "--ft_neg interpolate --ft_neg_granularity dim"
WITHOUT_NEGATIVES = {"SwAV": "--queue_epoch 0 --prototypes 30", "SimSiam": "", "BYOL": ""}
MEMORIES, TIMES = ("queues.", "banks.", "contrast."), {"images_per_second", "data_wait"}
LENGTHS = {"log_bytes", "events"}  # of files: times have more digits or fewer
LONG, LOOK = 900, 0.005  # seconds after which a run that ought to end hangs, and between two looks at one


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and other flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"methods": "MoCov2,InsDis,SimCLR", "launches": ",".join(LAUNCHES), "workers": "0,2"}
    for name, default in (defaults | {"kills": 20, "images": 500, "seed": 0}).items():
        help = f"{'all, or ' * (name == 'methods')}by default {default}"
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=help)
    if importlib.util.find_spec("tensorboard") is None:
        parser.error("tensorboard is not installed, which reads the events to compare: pip install tensorboard")
    return parser.parse_known_args(argv)


def write_pictures(folder: Path, count: int) -> None:
    """The first of the built-in pictures as PNG files in a folder for each class: in memory they need no workers."""
    images, labels = shapes.render("train")
    for i, (image, label) in enumerate(zip(images[:count], labels)):
        path = folder / shapes.CLASSES[label] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def attempt(command: list[str], how: signal.Signals | None = None, due: Callable[[], bool] = bool) -> int | None:
    """Run the command, once it is `due` send a signal to all its processes, and wait until the last one has ended.

    Returns the exit status if the signal was sent, None if all was over before. ValueError if it fails by itself or
    takes too long.
    """
    pipes, one_thread = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, **pipes, env=one_thread, text=True, start_new_session=True)
    start, said, sent = time.monotonic(), None, False
    try:
        while said is None:  # whoever is left of the processes holds the other end of the pipe
            try:
                said, _ = process.communicate(timeout=LOOK)
            except subprocess.TimeoutExpired:
                if time.monotonic() - start > LONG:
                    raise ValueError(f"{' '.join(command)}\nhas not ended after {LONG} seconds") from None
                if not sent and due():
                    os.killpg(process.pid, how)
                    sent = True
    finally:
        if said is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode and not sent:
        raise ValueError(f"{' '.join(command)}\nended with status {process.returncode}:\n{said}")
    return process.returncode if sent else None


def steps_logged(place: Path) -> int:
    log = place / "run" / "log.jsonl"
    return log.read_text().count('"kind": "step"') if log.exists() else 0


def sha256(value: object) -> str:
    """Of tensors, arrays and plain values in containers."""
    if isinstance(value, dict):
        content = "".join(f"{name}={sha256(value[name])}\n" for name in sorted(value, key=str)).encode()
    elif isinstance(value, (list, tuple)):
        content = "".join(map(sha256, value)).encode()
    elif hasattr(value, "shape"):
        array = np.asarray(value)
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the TensorBoard files in the order in which it was written, repetitions too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = (tag for tag in events.Tags()["scalars"] if tag.split("/")[-1] not in TIMES)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def digests(place: Path) -> dict[str, str]:
    """The SHA-256 of each part of what a complete run has left. ValueError unless each step is in the log once."""
    run, state = place / "run", checkpoint.load(place / "run" / "current.pth")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    memory = {name: x for name, x in state["method"].items() if name.startswith(MEMORIES)}
    steps = [record["step"] for record in records if record["kind"] == "step"]
    if steps != list(range(1, state["position"]["step"] + 1)):
        raise ValueError(f"the log of {place} has the steps {steps}")
    parts = {
        "weights": {name: x for name, x in state["method"].items() if name not in memory},
        "memory": memory,
        "optimizer": (state["optimizer"], state["scaler"]),
        "position": {name: x for name, x in state["position"].items() if name not in LENGTHS},
        "scores": {path.name: dict(np.load(path)) for path in (run / "scores").iterdir()},
        "log": [{name: x for name, x in record.items() if name not in TIMES} for record in records],
        "tensorboard": scalars(place / "tb" / "run"),
    }
    return {name: sha256(part) for name, part in parts.items()}


class Soak:
    """Runs below the folder `root`, on the pictures there."""

    def __init__(self, root: Path, seed: int, flags: list[str]):
        self.root, self.random, self.flags = root, random.Random(seed), flags
        self.fresh = (root / f"run{number:03}" for number in itertools.count())

    def line(self, launch: str, workers: str, method: str, place: Path) -> list[str]:
        before = {TORCHRUN: "-m torch.distributed.run --standalone --nproc_per_node 2"}.get(launch, "")
        paths = f"--data_folder {self.root}/pictures --model_path {place} --tb_path {place}/tb --num_workers {workers}"
        small = f"{SMALL} --method {method} {WITHOUT_NEGATIVES.get(method, FT_NEGATIVE)} {paths}"
        after = SPAWN if launch == SPAWN else ""
        return f"{sys.executable} {before} {ROOT}/main_contrast.py {small} {after}".split() + self.flags

    @functools.cache  # noqa: B019
    def whole(self, launch: str, method: str) -> tuple[dict[str, str], int]:
        """What an uninterrupted run leaves, and how many steps it has."""
        place = next(self.fresh)
        attempt(self.line(launch, "0", method, place))
        return digests(place), steps_logged(place)

    def cell(self, launch: str, workers: str, method: str, kills: int) -> tuple[str, str]:
        """What was killed when, and what differs then; of as many runs as it takes to kill `kills` times."""
        told, differ = [], []
        expected, steps = self.whole(PLAIN if launch == PLAIN else SPAWN, method)
        while len(told) < kills:
            place, status = next(self.fresh), 0
            line = self.line(launch, workers, method, place)
            while status is not None and len(told) < kills:
                how = self.random.choice(GENTLE) if self.random.random() < SHARE else signal.SIGKILL
                status = attempt(line, how, self.moment(place, steps))
                told += [] if status is None else [f"{how.name} after step {steps_logged(place)} of {steps} ({status})"]
            attempt(line)  # a complete run stays as it is
            differ += [name for name, digest in digests(place).items() if digest != expected[name]]
        return "; ".join(told), ", ".join(differ) or "nothing"

    def moment(self, place: Path, steps: int) -> Callable[[], bool]:
        """Whether a random one has come: some way into a random step, the start of the program being step 0."""
        step, looks = self.random.randrange(steps), iter(range(self.random.randrange(20)))
        return lambda: steps_logged(place) >= step and next(looks, None) is None


def main(argv: list[str]) -> bool:
    """Print the table; True if nothing differs."""
    asked, flags = parse(argv)
    methods = [*METHODS] if asked.methods == "all" else asked.methods.split(",")
    cells = [*itertools.product(asked.launches.split(","), asked.workers.split(","), methods)]
    dealt = itertools.cycle(random.Random(asked.seed).sample(cells, len(cells)))
    kills, results = Counter(itertools.islice(dealt, asked.kills)), []
    soak = Soak(Path(tempfile.mkdtemp(prefix="soak-")), asked.seed, flags)
    write_pictures(soak.root / "pictures", asked.images)
    print("| launch | workers | method | killed by | what differs |", "|---|---|---|---|---|", sep="\n")
    for cell in filter(kills.get, cells):
        try:
            told, differ = soak.cell(*cell, kills[cell])
        except ValueError as error:
            told, differ = "", "failed"
            print(error, file=sys.stderr)
        results.append(differ)
        print(f"| {' | '.join([*cell, told, differ])} |", flush=True)
    if {*results} == {"nothing"}:
        shutil.rmtree(soak.root)
    return not soak.root.exists()


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
