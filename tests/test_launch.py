"""How processes start, stop and die: every way computes the same, every end says what to do, and nothing lingers.

Most processes here are forked from one that has imported everything, which is what takes most of the time of a run.
"""

import itertools
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learning import checkpoint, parallel, signals

ROOT = Path(__file__).parents[1]
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["learning.pretraining", "learning.evaluation", "torch._dynamo", "tests.test_launch"])
SIZES = "--arch resnet18 --width 0.125 --input_res 16 --batch_size 32 --queue_size 40 --feat_dim 16 --seed 3 --lr 1e-3"
TINY = f"{SIZES} --num_workers 0 --print_freq 1 --device cpu --tb_path tb"
TWO_TASKS = {  # as srun sets it, rank by rank
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}
# A run of nothing but steps, which imports little.
STEPS = """
import sys, time
from types import SimpleNamespace
import torch
from learning import parallel
from learning.interrupt import Interrupt

def train(options):
    with Interrupt() as stop:
        for step in range(1, 10000):
            parallel.all_sum(torch.ones(1))
            time.sleep(0.02)
            if parallel.rank() == 1 and step == 2:
                print("under way", flush=True)
            if stop(step):
                break
    sys.stdout.write(f"stopped after {step}.\\n")
    return stop.status

if __name__ == "__main__":
    flags = {"nprocs": int(sys.argv[1]) or None, "multiprocessing_distributed": False, "world_size": -1, "node_rank": -1}
    devices = {"device": "cpu", "gpu": None, "dist_url": "", "dist_backend": "auto"}
    parallel.main(train, SimpleNamespace(**flags, **devices))
"""


class Started:
    """A program that runs in `folder`; what it and its children say is in a file there."""

    numbers = itertools.count()

    def __init__(self, folder, line, *, as_module=False, **environment):
        self.said_in = folder / f"said{next(self.numbers)}.txt"
        arguments = [part if part.startswith("-") else part for part in line.split()]
        self.process = WARM.Process(target=_become, args=(arguments, as_module, str(self.said_in), environment))
        self.process.start()

    @property
    def said(self):
        return self.said_in.read_text() if self.said_in.exists() else ""

    def wait_for(self, words):
        """Until it has said that."""
        within(120, lambda: re.search(words, self.said) or not self.process.is_alive())
        assert re.search(words, self.said), self.said

    def status(self):
        """How it ended. 30 seconds are plenty on the busiest machine; without an end it would be hours."""
        self.process.join(60)
        assert not self.process.is_alive(), f"still running\n{self.said}"
        return self.process.exitcode

    def kill(self, number):
        os.kill(self.process.pid, number)


def _become(arguments, as_module, said_in, environment):
    """Be what `python arguments` is (or `python -m arguments`), in the folder of the file `said_in`."""
    os.setsid()
    os.chdir(os.path.dirname(said_in))
    file = os.open(said_in, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv = arguments
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def processes_in(folder):
    """Numbers of the processes that run in `folder`, without those that are only waited for."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(process.name)] if process.joinpath("cwd").readlink() == folder else []
        except OSError:  # gone, or a zombie
            continue
    return found


def children_of(process, folder):
    of = {number: int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1]) for number in processes_in(folder)}
    return [number for number, parent in of.items() if parent == process]


@pytest.fixture
def start(tmp_path):
    """Starts programs in tmp_path, where nothing may be left running."""
    os.environ["PYTHONPATH"] = str(ROOT)
    yield lambda line, **settings: Started(tmp_path, line, **settings)
    within(15, lambda: not processes_in(tmp_path))
    left = processes_in(tmp_path)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left


@pytest.fixture
def steps(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    return str(tmp_path / "steps.py")


@pytest.fixture
def tiny(tmp_path):
    """Flags of a small run on 64 pictures in memory."""
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (64, 9))
    labels = {"train_labels": np.arange(64) % 3, "test_labels": np.arange(9) % 3}
    np.savez(tmp_path / "tiny.npz", train_images=train, test_images=test, **labels)
    return f"{TINY} --dataset npz --data_folder tiny.npz"


@pytest.fixture
def files(tmp_path):
    """Flags of a small run on 32 files, read by two processes."""
    for i in range(32):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (8 * i, 0, 0)).save(folder / f"{i}.png")
    flags = TINY.replace("--batch_size 32", "--batch_size 8").replace("--num_workers 0", "--num_workers 2")
    return f"{flags} --data_folder images --queue_size 16"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def srun(start, line, **environment):
    """Two tasks, as srun starts them."""
    both = TWO_TASKS | {"MASTER_PORT": free_port()} | environment
    return [start(line, SLURM_PROCID=rank, SLURM_LOCALID=rank, **both) for rank in "01"]


def weights(folder):
    return checkpoint.load(folder / "current.pth")["method"]


def step_of(folder):
    return checkpoint.load(folder / "current.pth")["position"]["step"]


def assert_equal_weights(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerances or {"atol": 0, "rtol": 0})


def test_all_ways_of_starting_two_processes_compute_the_same(start, tiny, tmp_path):
    line = f"main_contrast.py {tiny} --epochs 2 --ft_pos extrapolate --ft_neg interpolate --name"
    meet = f"--master_addr 127.0.0.1 --master_port {free_port()}"
    torchrun = f"torch.distributed.run --nnodes 2 --nproc_per_node 1 {meet} --node_rank"
    nodes = f"--nprocs 1 --world-size 2 --dist-url tcp://127.0.0.1:{free_port()} --rank"
    ways = {
        "spawned": lambda: [start(f"{line} spawned --multiprocessing-distributed --nprocs 2")],
        "torchrun": lambda: [start(f"{torchrun} {n} {ROOT}/{line} torchrun", as_module=True) for n in "01"],
        "nodes": lambda: [start(f"{line} nodes {nodes} {n}") for n in "01"],
        "srun": lambda: srun(start, f"{line} srun"),
        "alone": lambda: [start(f"{line} alone --bn_splits 2")],
    }
    for way, begin in ways.items():
        programs = begin()
        assert [program.status() for program in programs] == [0] * len(programs), [program.said for program in programs]
        assert "Done." in programs[0].said
        # A small learning rate, because one process rounds otherwise, and training amplifies every difference.
        tolerances = {"atol": 1e-5, "rtol": 1e-4} if way == "alone" else {}
        assert_equal_weights(weights(tmp_path / "save" / way), weights(tmp_path / "save" / "spawned"), **tolerances)
