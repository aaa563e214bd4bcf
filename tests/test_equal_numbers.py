"""Every method computes on two processes what it computes on one, and goes on after a stop as if there had been none.

Two ranks are two real gloo processes. They, and this process for one rank, run all of `pretrain`; what is compared is
what it leaves in its folder, and the gradients of every step.
"""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from learning import build, checkpoint, launch, parallel
from learning.interrupt import Interrupt
from learning.pretraining import pretrain
from memory.feature_transform import beta_quantiles
from options import contrast
from options.presets import METHODS
from tests.test_training import assert_same_run, equal, records

ROOT = Path(__file__).parents[1]
SMALL = """--arch resnet18 --width 0.125 --stem small --feat_dim 16 --input_res 16 --batch_size 8 --queue_size 20
    --epochs 2 --warmup_epochs 0 --print_freq 1 --save_score --amp off --seed 3 --device cpu --name run"""
IMAGES = 18  # two steps an epoch: of four, those of a bank begin to teach with the third
FT = "--ft_pos extrapolate --ft_pos_granularity sample --ft_neg append --ft_neg_granularity dim --ft_post_norm both"
FT_POSITIVE = FT.split(" --ft_neg ")[0]
SPECIAL = {
    "InfoMin": f"{FT} --ft_jigsaw",
    "SimSiam": FT_POSITIVE,
    "BYOL": FT_POSITIVE,
    "SwAV": f"{FT_POSITIVE} --queue_epoch 0 --queue_size 16 --prototypes 10 --freeze_prototypes 2 --small_crops 2",
}
LINES = {method: f"--method {method} {SPECIAL.get(method, FT)}" for method in METHODS} | {
    "scalar_FT": "--method MoCov2 --ft_pos extrapolate --ft_neg interpolate",
    "split": f"--method MoCov2 {FT} --bn_splits 2",
    "parts": f"--method MoCov2 {FT} --accumulate 2",
    "InsDis_NCE": f"--method InsDis {FT} --loss nce",
    "CMC_queue_jigsaw": f"--method Customize --modal CMC --jigsaw {FT}",
    "CMC_bank_jigsaw_NCE": f"--method Customize --modal CMC --mem bank --jigsaw --loss nce {FT}",
    "SimCLR_CMC": f"--method SimCLR --modal CMC --no_sync_bn {FT}",
}


# One process and two


@contextlib.contextmanager
def precision(dtype):
    """New tensors have this type, and so has what `float()` makes, tables that are made once included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    beta_quantiles.cache_clear()
    with mock.patch.object(Tensor, "float", lambda x: x.to(dtype)):
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            beta_quantiles.cache_clear()


class Double:
    """A loader, but its batches, made in single precision as ever, come in double precision."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        with precision(torch.float32):
            batches = list(self.loader)
        return ({name: x.double() if x.is_floating_point() else x for name, x in batch.items()} for batch in batches)


class Parts:
    """The parts of a run in double precision; keeps its method and the gradients of its steps.

    In single precision a sum over two processes differs from one in its last bits, a ReLU in a hundred thousand then
    goes the other way, and from there on gradients differ by percents. In double precision nothing is left of that,
    and whatever differs does so for a reason.
    """

    def __init__(self):
        self.gradients = []
        self.make = {name: getattr(build, name) for name in ("method", "optimizer", "train_loader", "eval_loader")}

    def replaced(self):
        return {name: getattr(self, name) for name in self.make}

    def method(self, *of):
        self.made = self.make["method"](*of).double()
        return self.made

    def optimizer(self, *of):
        made = self.make["optimizer"](*of)
        made.register_step_pre_hook(lambda *step: self.gradients.append(self.gradient()))
        return made

    def train_loader(self, *of):
        return Double(self.make["train_loader"](*of))

    def eval_loader(self, *of):
        return Double(self.make["eval_loader"](*of))

    def gradient(self):
        return {name: p.grad.clone() for name, p in self.made.named_parameters() if p.grad is not None}


def run(line, folder):
    options, origins, notes = contrast.parse(f"{SMALL} {line} --model_path {folder} --tb_path {folder}/tb".split())
    pretrain(options, origins=origins, notes=notes)


def numbers(launching):
    """What every process does: train each line, and keep what no run folder holds in a file of its own."""
    place, processes = Path(launching.model_path), parallel.world_size()
    for name, line in LINES.items():
        parts, chunks = Parts(), 2 * (1 + ("--bn_splits" in line)) // processes
        norm = "" if contrast.parse(line.split())[0].sync_bn else f"--bn_splits {chunks}"
        with precision(torch.float64), mock.patch.multiple(build, **parts.replaced()):
            line += f" {norm} --dataset npz --data_folder {place}/few.npz --knn_freq 2"
            run(line, place / name / str(processes))
        state = {part: x for part, x in parts.made.state_dict().items() if "running_" not in part}
        kept = {"gradients": parts.gradients, "state": state}
        torch.save(kept, place / name / f"{processes}-{parallel.rank()}.pth")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every line trained by one process and by two."""
    place, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8) for name in ("train", "test")}
    labels = {f"{name}_labels": np.arange(IMAGES) % 3 for name in images}
    np.savez(place / "few.npz", **labels, **{f"{name}_images": x for name, x in images.items()})
    for processes in (1, 2):
        started(numbers, place, processes)
    return place


def started(worker, folder, processes):
    flags = f"--device cpu --nprocs {processes} --model_path {folder}"
    launch.launch(worker, contrast.parse(flags.split())[0])


def assert_close(ours, theirs):
    """Named tensors differ by less than 1e-6 of their norm, or of a millionth of all their norm, if that is more.

    The latter is for gradients that are zero but for rounding: those of biases before a batch norm.
    """
    assert ours.keys() == theirs.keys()
    numbers = {name: x.double() for name, x in ours.items()}
    least = 1e-6 * torch.stack([x.norm() for x in numbers.values()]).norm()
    for name, x in numbers.items():
        assert (theirs[name].double() - x).norm() <= 1e-6 * max(x.norm(), least), name


def held(folder):
    """What the run of a folder left that is a matter of numbers: named tensors, of two score files at last."""
    state = checkpoint.load(folder / "current.pth")
    yield state["method"]
    yield {str(i): x["momentum_buffer"] for i, x in state["optimizer"]["state"].items()}
    for path in sorted((folder / "scores").iterdir()):
        with np.load(path) as scores:
            yield {name: torch.from_numpy(scores[name]) for name in scores.files}


@pytest.mark.parametrize("name", LINES)
def test_two_processes_compute_what_one_computes(place, name):
    whole, first, second = (torch.load(place / name / f"{of}.pth") for of in ("1-0", "2-0", "2-1"))
    assert equal(first, second)
    assert len(whole["gradients"]) == len(first["gradients"]) == 4
    for ours, theirs in zip(whole["gradients"], first["gradients"]):
        assert_close(ours, theirs)
    one, two = (place / name / processes / "run" for processes in "12")
    for ours, theirs in zip(held(one), held(two), strict=True):
        assert_close(ours, theirs)
    for kind, count in (("step", 4), ("epoch", 2), ("knn", 1)):
        assert len(records(one, kind)) == count
        for ours, theirs in zip(records(one, kind), records(two, kind), strict=True):
            assert ours.pop("kind") == theirs.pop("kind")
            assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)
    for ours, theirs in zip(records(one, "scores"), records(two, "scores"), strict=True):
        assert ours.pop("kind") == theirs.pop("kind") and ours.keys() == theirs.keys()
        for value, number in ours.items():
            assert theirs[value] == pytest.approx(number, abs=2e-5), value


# Stopping and going on: ways to launch x loader workers


SORTS = {"queue": LINES["MoCov2"], "bank": LINES["InsDis"], "batch": LINES["SimCLR_CMC"]}
LAUNCHES = ("plain", "spawned", "torchrun")


def stops(launching):
    """What every process does: train each sort without a stop, and with one for each number of workers."""
    place = Path(launching.model_path)
    for name, line in SORTS.items():
        line += f" --dataset folder --data_folder {place.parent}/pictures --num_workers"
        run(f"{line} 0", place / name / "whole")
        for workers in (0, 2):
            folder = place / name / str(workers)
            stopped = random.Random(f"{place.name} {name} {workers}").choice((1, 3))
            with mock.patch.object(Interrupt, "__call__", lambda self, step, stopped=stopped: step == stopped):
                run(f"{line} {workers}", folder)
            run(f"{line} {workers} --resume auto", folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with what `stops` left under each of LAUNCHES."""
    place, rng = tmp_path_factory.mktemp("stops"), np.random.default_rng(0)
    for i in range(IMAGES):
        path = place / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
    started(stops, place / "plain", 1)
    started(stops, place / "spawned", 2)
    (place / "torchrun.py").write_text(
        f"from tests.test_equal_numbers import started, stops\nstarted(stops, {str(place / 'torchrun')!r}, 2)\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(place / "torchrun.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=300)
    return place


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("sort", SORTS)
def test_a_stop_changes_nothing(stopped, sort, launch, workers):
    whole, parts = (stopped / launch / sort / name / "run" for name in ("whole", str(workers)))
    assert (parts / "log.txt").read_text().count("Stopped after step") == 1
    assert_same_run(whole, parts)


@pytest.mark.parametrize("sort", SORTS)
def test_how_processes_are_started_changes_nothing(stopped, sort):
    plain, spawned, torchrun = (stopped / launch / sort / "whole" / "run" for launch in LAUNCHES)
    assert_same_run(spawned, torchrun)
    for ours, theirs in zip(list(held(plain))[2:], list(held(spawned))[2:], strict=True):
        assert torch.equal(ours["index"], theirs["index"]) and torch.equal(ours["step"], theirs["step"])
