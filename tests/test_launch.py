"""How processes start, stop and die: every way computes the same, every end says what to do, and nothing lingers.

Most processes here are forked from one that has imported everything, which is what takes most of the time of a run.
"""

import itertools
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learning import checkpoint, launch, parallel, signals

ROOT = Path(__file__).parents[1]
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    ["learning.pretraining", "learning.evaluation", "torch._dynamo", "torch.distributed.run", "tests.test_launch"]
)
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
from learning import launch, parallel
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
    flags = {"nprocs": int(sys.argv[1]) or None, "multiprocessing_distributed": False, "dist_url": "", "world_size": -1}
    flags |= {"node_rank": -1, "device": "cpu", "gpu": None, "dist_backend": "auto"}
    launch.main(train, SimpleNamespace(**flags))
"""


class Started:
    """A program that runs in `folder`; what it and its children say is in a file there."""

    numbers = itertools.count()

    def __init__(self, folder, line, **environment):
        self.said_in = folder / f"said{next(self.numbers)}.txt"
        self.process = WARM.Process(target=_become, args=(line.split(), str(self.said_in), environment))
        self.process.start()

    @property
    def said(self):
        return self.said_in.read_text() if self.said_in.exists() else ""

    def wait_for(self, words):
        """Until it has said that."""
        within(900, lambda: re.search(words, self.said) or not self.process.is_alive())
        assert re.search(words, self.said), self.said

    def status(self):
        """How it ended. Machines may be busy, but whatever waits for an end that does not come waits longer."""
        self.process.join(900)
        assert not self.process.is_alive(), f"still running\n{self.said}"
        return self.process.exitcode

    def kill(self, number):
        os.kill(self.process.pid, number)


def _become(arguments, said_in, environment):
    """Be what `python arguments` is, in the folder of the file `said_in`."""
    os.setsid()
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # where the tests are killed, so is what they started
    os.chdir(os.path.dirname(said_in))
    file = os.open(said_in, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.multiprocessing.set_start_method(None, force=True)  # which is not to be the one this process came by
    sys.argv = arguments
    if "WARM" in environment:  # the processes it spawns are forked too
        torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="forkserver")
    if arguments[0] == "torchrun":
        sys.exit(torch.distributed.run.main(arguments[1:]))
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
    """Those of `processes_in(folder)` that `process` started, the newest last."""
    stats = {number: Path(f"/proc/{number}/stat").read_text() for number in processes_in(folder)}
    return sorted(number for number, stat in stats.items() if int(stat.rsplit(")", 1)[1].split()[1]) == process)


@pytest.fixture
def start(tmp_path):
    """Starts programs in tmp_path, where nothing may be left running."""
    os.environ["PYTHONPATH"] = str(ROOT)
    yield lambda line, **settings: Started(tmp_path, line, **settings)
    within(300, lambda: not processes_in(tmp_path))
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


def scores(folder):
    return [path.read_bytes() for path in sorted(folder.glob("scores/*"))]


def step_of(folder):
    return checkpoint.load(folder / "current.pth")["position"]["step"]


def assert_equal_weights(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerances or {"atol": 0, "rtol": 0})


def test_all_ways_of_starting_two_processes_compute_the_same(start, tiny, tmp_path):
    line = f"main_contrast.py {tiny} --epochs 2 --ft_pos extrapolate --ft_neg interpolate --save_score --name"
    meet = f"--master_addr 127.0.0.1 --master_port {free_port()}"
    torchrun = f"torchrun --nnodes 2 --nproc_per_node 1 {meet} --node_rank"
    nodes = f"--nprocs 1 --world-size 2 --dist-url tcp://127.0.0.1:{free_port()} --rank"
    ways = {
        "spawned": lambda: [start(f"{line} spawned --multiprocessing-distributed --nprocs 2")],
        "torchrun": lambda: [start(f"{torchrun} {node} {ROOT}/{line} torchrun") for node in "01"],
        "nodes": lambda: [start(f"{line} nodes {nodes} {node}", WARM="yes") for node in "01"],
        "srun": lambda: srun(start, f"{line} srun"),
        "alone": lambda: [start(f"{line} alone --bn_splits 2")],
    }
    for way, begin in ways.items():
        programs = begin()
        assert [program.status() for program in programs] == [0] * len(programs), [program.said for program in programs]
        # A small learning rate, because one process rounds otherwise, and training amplifies every difference.
        tolerances = {"atol": 1e-5, "rtol": 1e-4} if way == "alone" else {}
        assert_equal_weights(weights(tmp_path / "save" / way), weights(tmp_path / "save" / "spawned"), **tolerances)
        assert way == "alone" or scores(tmp_path / "save" / way) == scores(tmp_path / "save" / "spawned")
        assert (tmp_path / "save" / way / "log.txt").read_text().count("epoch 2/2 done") == 1


# Signals


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_stops_after_the_step_saves_and_says_how_to_go_on(start, tiny, tmp_path, number):
    program = start(f"main_contrast.py {tiny} --epochs 900 --name run")
    program.wait_for("step 3/")
    program.kill(number)
    assert program.status() == 128 + number
    found = re.search(r"Stopped after step (\d+); go on with: python \S*main_c.* --resume save/run\n", program.said)
    assert step_of(tmp_path / "save/run") == int(found[1]) >= 3
    assert "Traceback" not in program.said


def test_a_run_that_came_to_its_end_was_not_stopped(start, tiny):
    """Neither is one that pauses where it was told to, so that what follows it is done."""
    program = start(f"main_contrast.py {tiny} --epochs 9 --stop_epoch 2 --name run")
    assert program.status() == 0 and "Stopped after step 4" in program.said


def test_a_signal_to_one_process_stops_all_after_the_same_step(start, tiny, tmp_path):
    programs = srun(start, f"main_contrast.py {tiny} --epochs 900 --name run")
    programs[0].wait_for("step 3/")
    programs[1].kill(signal.SIGUSR1)
    assert [program.status() for program in programs] == [138, 138], programs[0].said
    found = re.search(r"Stopped after step (\d+); go on with: srun python \S*main_c", programs[0].said)
    assert step_of(tmp_path / "save/run") == int(found[1])


@pytest.mark.parametrize("send, number", [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)])
def test_a_signal_to_the_process_that_started_the_others_reaches_them(start, steps, send, number):
    """Once, although a terminal sends it to them too."""
    program = start(f"{steps} 2")
    program.wait_for("under way")
    send(program.process.pid, number)
    assert program.status() == 128 + number
    first, second = re.findall(r"stopped after \d+", program.said)
    assert first == second


def test_spawned_processes_do_not_outlive_the_one_that_started_them(start, steps, tmp_path):
    program = start(f"{steps} 2")
    program.wait_for("under way")
    program.kill(signal.SIGKILL)
    assert program.status() == -9
    within(300, lambda: program.said.count("stopped after") == 2)
    assert program.said.count("stopped after") == 2


def test_the_second_signal_ends_at_once_and_the_same_one_again_does_not():
    with signals.Patience() as patience:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # from the terminal and from the launcher
            signal.raise_signal(number)
        assert patience.number == signal.SIGTERM
        patience.since -= 2
        with pytest.raises(signals.Ended, match="--resume auto") as ended:
            signal.raise_signal(signal.SIGINT)
    assert ended.value.status == 130


def test_a_signal_ends_an_evaluation(start, tiny, tmp_path):
    sizes = tiny.replace("--queue_size 40 --feat_dim 16", "")
    line = f"main_linear.py {sizes} --epochs 900 --cache_features --name probe"
    program = start(line)
    program.wait_for("epoch 2/900  train")
    program.kill(signal.SIGUSR1)
    assert program.status() == 138
    assert program.said.endswith("main_linear.py: stopped; " + signals.GO_ON + ".\n")
    assert checkpoint.load(tmp_path / "save/probe/current.pth")["position"]["epoch"] >= 1  # the second is being saved


class Store:
    """The one operation of a group's store that the agreement takes."""

    def __init__(self):
        self.values = {}

    def compare_set(self, key, expected, desired):
        if self.values.get(key, "") == expected:
            self.values[key] = desired
        return self.values[key].encode()


@pytest.mark.parametrize("seed", range(10))
def test_processes_agree_on_a_step_however_far_apart_they_are(monkeypatch, seed):
    """Here they wait for each other nowhere, so that one may be many steps ahead."""
    chance, store = random.Random(seed), Store()
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    agreements, steps, stopped = [parallel.Agreement() for _ in range(3)], [10] * 3, [0] * 3
    asked_at, asking = chance.randrange(60), chance.randrange(3)
    for turn in itertools.count():
        who = chance.choice([i for i in range(3) if not stopped[i]])
        steps[who] += 1
        wanted = signal.SIGTERM if turn >= asked_at and who == asking else 0
        stopped[who] = agreements[who](steps[who], wanted)
        if all(stopped):
            break
    assert stopped == [signal.SIGTERM] * 3 and len(set(steps)) == 1


# Processes that die


def test_a_spawned_process_that_is_killed_ends_the_run_with_a_sentence(start, steps, tmp_path):
    program = start(f"{steps} 2")
    program.wait_for("under way")
    os.kill(children_of(program.process.pid, tmp_path)[-1], signal.SIGKILL)
    assert program.status() == 1
    assert re.search(r"steps.py: Process \d was ended by SIGKILL.*--resume auto.*\n$", program.said)
    assert "Traceback" not in program.said


def test_a_process_whose_peer_is_killed_ends_with_a_sentence(start, steps):
    programs = srun(start, f"{steps} 0")
    programs[1].wait_for("under way")
    programs[0].kill(signal.SIGKILL)
    assert programs[1].status() == 1
    assert programs[1].said.endswith(f"steps.py: Another process of this run has ended; {signals.GO_ON}.\n")
    assert "Traceback" not in programs[1].said


def test_torchrun_restarts_a_killed_process_which_goes_on(start, tiny, tmp_path):
    line = f"main_contrast.py {tiny} --epochs 6 --name"
    program = start(f"torchrun --standalone --nproc_per_node 2 --max_restarts 1 {ROOT}/{line} run --resume auto")
    within(900, (tmp_path / "save/run/current.pth").exists)
    os.kill(children_of(program.process.pid, tmp_path)[-1], signal.SIGKILL)
    assert [other.status() for other in srun(start, f"{line} whole")] == [0, 0]
    assert program.status() == 0, program.said
    assert "going on from save/run/current.pth" in program.said
    assert_equal_weights(weights(tmp_path / "save/run"), weights(tmp_path / "save/whole"))


def test_a_killed_loader_process_costs_nothing(start, files, tmp_path):
    program = start(f"main_contrast.py {files} --epochs 900 --name run")
    program.wait_for("step 6/")
    os.kill(children_of(program.process.pid, tmp_path)[-1], signal.SIGKILL)
    assert program.status() == 1
    assert program.said.count("A loader process was ended from outside") == 1 and "--resume auto" in program.said
    last = int(re.findall(r"step (\d+)/", program.said)[-1])
    assert step_of(tmp_path / "save/run") == last and "Traceback" not in program.said


def test_a_killed_loader_process_ends_all_processes(start, files, tmp_path):
    programs = srun(start, f"main_contrast.py {files} --epochs 900 --name run")
    programs[0].wait_for("step 6/")
    os.kill(children_of(programs[1].process.pid, tmp_path)[-1], signal.SIGKILL)
    assert [program.status() for program in programs] == [1, 1]
    assert "Another process of this run has ended" in programs[0].said
    assert "A loader process was ended from outside" in programs[1].said


def test_loader_processes_leave_signals_to_the_loop(start, files, tmp_path):
    """Slurm and torchrun send them to every process there is."""
    program = start(f"main_contrast.py {files} --epochs 900 --name run")
    program.wait_for("step 6/")
    os.killpg(program.process.pid, signal.SIGTERM)
    assert program.status() == 143, program.said
    assert "Stopped after step" in program.said


# Slurm


def test_tasks_of_srun_know_their_place():
    step = {
        "SLURM_STEP_NODELIST": "gpu[03-04,9],fat1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2",
        "SLURM_STEP_NUM_TASKS": "11", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "1",
    }  # fmt: skip
    assert launch._slurm(step) == {
        "RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03", "MASTER_PORT": "24561",
    }  # fmt: skip
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999"}
    assert launch._slurm(step | chosen).items() >= chosen.items()
    assert launch._slurm(step | {"SLURM_STEP_NODELIST": "a1,a2"})["MASTER_ADDR"] == "a1"


def test_a_shell_of_slurm_is_no_task():
    """sbatch and salloc set these; srun with one task sets the last as well."""
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
    assert launch._slurm(shell) == launch._slurm(shell | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize("status, again", [(0, False), (1, False), (138, True), (143, False)])
def test_the_slurm_script_requeues_what_was_stopped_ahead_of_time(tmp_path, status, again):
    for name, does in {"srun": f'echo "$@" > srun.txt; exit {status}', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    command = ["bash", str(ROOT / "scripts/slurm.sbatch"), "--data_folder", "my/images", "--name", "mine"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, check=False, timeout=60)
    assert ended.returncode == status
    started = (tmp_path / "srun.txt").read_text()
    assert "python main_contrast.py" in started and "--data_folder my/images --name mine --resume auto" in started
    assert (tmp_path / "scontrol.txt").exists() == again
    assert not again or (tmp_path / "scontrol.txt").read_text() == "requeue 42\n"
