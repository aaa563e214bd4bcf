"""Starting the processes of a run, however many there are and whoever starts them, and ending them."""

import gc
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from learning import signals

# What PyTorch's own errors contain -> what to say to somebody who can do something about it.
TROUBLES = {
    "out of memory": "The GPU's memory is full; lower --batch_size, --input_res or --width, or try --amp.",
    "DefaultCPUAllocator": "The memory is full; lower --batch_size, --input_res, --width or --num_workers.",
    "MemoryError": "The memory is full; lower --batch_size, --input_res, --width or --num_workers.",
    "PytorchStreamWriter": "A file could not be written to its end; is the disk full?",
    "EADDRINUSE": "The port where the processes meet is in use; choose another in --dist_url or MASTER_PORT.",
}
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "DistNetworkError", "ncclRemoteError")
TOLD = (ValueError, FloatingPointError, OSError, KeyboardInterrupt)  # what ends in one sentence, without a traceback
Worker = Callable[[Any], int | None]  # from the options to the exit status


def main(worker: Worker, options: Any) -> None:
    """`launch`, and what a user can cause ends the program with one sentence and code 1 instead of a traceback.

    After a signal the exit status is 128 + its number, however the processes were started.
    """
    signals.end_at_once()
    try:
        status = launch(worker, options)
    except TOLD as error:
        status = getattr(error, "status", 1)
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        _tell_torchrun(str(error))
        if dist.is_initialized():
            _leave(status)
    if status:
        sys.exit(status)


def launch(worker: Worker, options: Any) -> int:
    """Run `worker(options)` in this process, as a rank of torchrun or srun, or in processes spawned here.

    `RANK` in the environment means that somebody else started the processes, and so do several tasks of srun unless
    the options ask for processes. Otherwise this node starts `options.nprocs` of them; with
    `--multiprocessing-distributed` one per visible GPU, or one without a GPU. Returns the exit status.
    ValueError also for memory or a disk that ran full.
    """
    _check_devices(options)
    nodes, local = max(options.world_size, 1), _local_processes(options)
    if "RANK" not in os.environ and nodes == 1 and not (options.nprocs or options.multiprocessing_distributed):
        os.environ.update(_slurm(os.environ))
    if "RANK" in os.environ:
        return _join(worker, options)
    if nodes * local == 1:
        with _plainly():
            return worker(options) or 0
    if _uses_gpus(options) and local > torch.cuda.device_count():
        raise ValueError(
            f"--nprocs {local} is more than the {torch.cuda.device_count()} GPUs; lower it or add --device cpu."
        )
    return _spawn(worker, options, _rendezvous(options.dist_url, nodes), nodes, local)


def _local_processes(options: Any) -> int:
    if options.nprocs is not None:
        return options.nprocs
    everything = options.multiprocessing_distributed and options.device != "cpu"
    return max(torch.cuda.device_count(), 1) if everything else 1


def _uses_gpus(options: Any) -> bool:
    return torch.cuda.is_available() and options.device != "cpu"


def _check_devices(options: Any) -> None:
    """ValueError for a GPU that was asked for and is not there."""
    asked = {"--device cuda": options.device == "cuda", "--dist_backend nccl": options.dist_backend == "nccl"}
    asked[f"--gpu {options.gpu}"] = options.gpu is not None
    flags = [flag for flag, is_asked in asked.items() if is_asked]
    if flags and not _uses_gpus(options):
        there = "--device cpu uses none" if torch.cuda.is_available() else "PyTorch sees none"
        raise ValueError(f"{flags[0]} asks for a GPU, but {there}; leave it out or use a CUDA build on a GPU machine.")
    if options.gpu is not None and options.gpu >= torch.cuda.device_count():
        raise ValueError(f"{flags[-1]} does not exist: there are {torch.cuda.device_count()} GPUs, counted from 0.")


@contextmanager
def _plainly() -> Iterator[None]:
    """Say in a sentence what PyTorch says in many, where the user can do something about it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if any(words in repr(error) for words in LOST):
            time.sleep(2)  # who watches the processes is to see the end of the other one first, and what it said
            raise ChildProcessError(f"Another process of this run has ended; {signals.GO_ON}.") from error
        for words, sentence in TROUBLES.items():
            if words in repr(error):
                raise ValueError(sentence) from error
        raise


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, of one of several tasks of srun; nothing elsewhere.

    SLURM_STEP_NUM_TASKS comes from srun alone: in the shell of sbatch or salloc SLURM_PROCID and SLURM_NTASKS are set
    as well, but plain `python` there is one process. Rank 0 runs on the first node of the step; of two runs on it at
    the same time, each has a port of its own job and step.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu[03-07,9],fat1 -> gpu03
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])  # 4(x2),3 -> 4, 4, 3
    per_node = [count for count, times in tasks for _ in range(int(times or 1))]
    run = 10 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_node[int(environment["SLURM_NODEID"])],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(10000 + run % 20000)),  # below those that systems hand out
    }


def launcher() -> str:
    """How the user's command line begins. What torchrun itself was told is not known here."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun ..."
    return "srun python" if _slurm(os.environ) else "python"


def _rendezvous(url: str, nodes: int) -> dict[str, str]:
    """Several nodes meet at `url`. One node takes a free port: a fixed one would make two runs collide."""
    if nodes > 1:
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--dist_url {url} is not of the form tcp://HOST:PORT, where the first node is reached.")
        return {"MASTER_ADDR": host, "MASTER_PORT": port}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}


def _spawn(worker: Worker, options: Any, environment: dict[str, str], nodes: int, local: int) -> int:
    """Start `local` processes, wait for them and return their exit status. Signals are theirs to answer."""
    environment |= {"WORLD_SIZE": str(nodes * local), "LOCAL_WORLD_SIZE": str(local)}
    # A process that ends in the middle of things leaves semaphores, which are cleaned up with a warning to nobody.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    first_rank = max(options.node_rank, 0) * local
    endings = mp.get_context("spawn").SimpleQueue()
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)  # else it reports that it ends the other processes
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # inherited: while they load, signals wait
    context = mp.spawn(_spawned, (worker, options, environment, first_rank, endings), nprocs=local, join=False)
    try:
        with signals.Patience(lambda number: _pass_on(number, context.processes)):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
            while not context.join(grace_period=5):
                pass
        return 0
    except mp.ProcessExitedException as error:
        return _ending(error, endings)
    finally:
        _pass_on(signal.SIGKILL, context.processes)


def _pass_on(number: int, processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def _ending(error: mp.ProcessExitedException, endings: Any) -> int:
    """The exit status of the process that ended first, or what it said as an error."""
    if error.exit_code < 0:
        why = ", mostly for want of memory" if error.signal_name == "SIGKILL" else ""
        raise ChildProcessError(
            f"Process {error.error_index} was ended by {error.signal_name}{why}; {signals.GO_ON}."
        ) from None
    if endings.empty():
        return error.exit_code
    status, sentence = endings.get()
    raise (ValueError(sentence) if status == 1 else signals.Ended(status - 128)) from None


def _spawned(
    local_rank: int, worker: Worker, options: Any, environment: dict[str, str], first_rank: int, endings: Any
) -> None:
    signals.end_at_once()
    os.environ.update(environment, RANK=str(first_rank + local_rank), LOCAL_RANK=str(local_rank))
    mp.set_start_method(None, force=True)  # loader workers start as they do in a single process, and not by spawning
    torch.set_num_threads(max(torch.get_num_threads() // int(environment["LOCAL_WORLD_SIZE"]), 1))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
        if not mp.parent_process().is_alive():  # later, a signal tells
            raise signals.Ended(signal.SIGKILL)
        status = _join(worker, options)
    except TOLD as error:
        status = getattr(error, "status", 1)
        endings.put((status, str(error)))
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    """End this process as it is: others may wait in a collective, which a tidy end would join."""
    for child in mp.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _tell_torchrun(sentence: str) -> None:
    """Put the sentence where torchrun looks for the cause, which it repeats below its own traceback."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        about = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        content = {"message": {"message": sentence, "extraInfo": about}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))


def _join(worker: Worker, options: Any) -> int:
    """Run `worker(options)` as the process that the environment says this is; returns its exit status."""
    with _plainly():
        if _uses_gpus(options):  # of which srun may show each process its own alone
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = options.dist_backend if options.dist_backend != "auto" else "nccl" if _uses_gpus(options) else "gloo"
        store, number, processes = next(dist.rendezvous("env://"))
        # torchrun's store outlives its processes: what is in it from before a restart would mislead those after it. The
        # nodes of several count their restarts apart.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=processes)
        status = worker(options) or 0
        signals.ignore()  # who sees the first process go may send one to the others
        gc.collect()  # a DDP reducer that outlives its process group can abort at exit
        dist.barrier()
        dist.destroy_process_group()
    return status
