"""Everything that knows there may be more than one process. With one process each call is a no-op."""

import gc
import inspect
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def launch(worker: Callable[[Any], None], options: Any) -> None:
    """Run `worker(options)` in this process, as a rank of torchrun, or in processes spawned here.

    `RANK` in the environment means that somebody else started the processes. Otherwise this node starts
    `options.nprocs` of them; with `--multiprocessing-distributed` one per visible GPU, or one without a GPU.
    """
    nodes, local = max(options.world_size, 1), _local_processes(options)
    if "RANK" in os.environ:
        _join(worker, options)
    elif nodes * local == 1:
        worker(options)
    else:
        environment = _rendezvous(options.dist_url, nodes)
        node = max(options.node_rank, 0)
        arguments = (worker, options, environment, nodes * local, node * local, local)
        try:
            mp.spawn(_spawned, args=arguments, nprocs=local)
        except mp.ProcessExitedException:
            raise ValueError("one of the processes stopped; what is said above tells why.") from None


def _local_processes(options: Any) -> int:
    if options.nprocs is not None:
        return options.nprocs
    everything = options.multiprocessing_distributed and options.device != "cpu"
    return max(torch.cuda.device_count(), 1) if everything else 1


def _rendezvous(url: str, nodes: int) -> dict[str, str]:
    """Several nodes meet at `url`. One node takes a free port: a fixed one would make two runs collide."""
    if nodes > 1:
        host, port = url.removeprefix("tcp://").rsplit(":", 1)
        return {"MASTER_ADDR": host, "MASTER_PORT": port}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}


def _spawned(
    local_rank: int, worker: Callable, options: Any, environment: dict, world: int, first_rank: int, local: int
) -> None:
    ranks = {"RANK": str(first_rank + local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world)}
    os.environ.update(environment | ranks)
    torch.set_num_threads(max(torch.get_num_threads() // local, 1))
    try:
        _join(worker, options)
    except (ValueError, FloatingPointError) as error:  # a sentence for the user: once, and without a traceback
        if local_rank == 0:
            print(error, file=sys.stderr, flush=True)
        os._exit(1)  # not sys.exit: other ranks may wait in a collective, which a tidy end would join


def _join(worker: Callable, options: Any) -> None:
    cuda = torch.cuda.is_available() and options.device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = options.dist_backend if options.dist_backend != "auto" else "nccl" if cuda else "gloo"
    dist.init_process_group(backend)
    worker(options)
    gc.collect()  # a DDP reducer that outlives its process group can abort at exit
    dist.barrier()
    dist.destroy_process_group()


def device(wanted: str = "auto", gpu: int | None = None) -> torch.device:
    """The device of this process: the GPU `launch` chose, `--gpu`, or the first one; the CPU without one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda was asked for, but PyTorch sees no GPU; use --device cpu or install a CUDA build."
        )
    return torch.device("cuda", torch.cuda.current_device() if gpu is None else gpu)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def wrap(module: nn.Module) -> nn.Module:
    """Replicate `module`: parameters and memories are copied from rank 0 once, and never broadcast again."""
    if world_size() == 1:
        return module
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)
    parameter = next(module.parameters())
    ids = [parameter.device.index] if parameter.is_cuda else None
    known = inspect.signature(DistributedDataParallel).parameters
    per_step_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.13
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **{per_step_sync: False})


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (picklable) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_rank(flag: bool) -> bool:
    """True everywhere as soon as `flag` is true somewhere. All ranks must call it at the same step."""
    if world_size() == 1:
        return flag
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(all_sum(torch.tensor(float(flag), device=where)) > 0)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Concatenate `x` (n, ...) over ranks, without gradient; n is the same on every rank."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def gather_uneven(x: Tensor) -> Tensor:
    """Concatenate `x` (n, ...) over ranks, where n may differ from rank to rank."""
    if world_size() == 1:
        return x
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def all_sum(x: Tensor) -> Tensor:
    """Sum of `x` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_mean(x: Tensor) -> Tensor:
    """Mean of `x` over ranks, in place."""
    return all_sum(x).div_(world_size()) if world_size() > 1 else x


def average_running_statistics(module: nn.Module) -> None:
    """Give every rank the mean of all ranks' batch-norm running statistics.

    They are linear in what each rank has seen, so averaging before they are used equals averaging every step.
    """
    if world_size() == 1:
        return
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            all_mean(buffer)


@torch.no_grad()
def shuffled(encode: Callable[[Tensor], list[Tensor]], images: Tensor, generator: Generator) -> list[Tensor]:
    """Encode the global batch re-dealt over ranks, so batch norm cannot match key to query (MoCo, section 3.3).

    `generator` is in the same state on every rank. With one process the batch is permuted for the forward pass,
    which is what split batch norm needs to do the same. Embeddings return in the order of `images`.
    """
    n = len(images)
    order = torch.randperm(n * world_size(), generator=generator, device=images.device)
    mine = slice(rank() * n, (rank() + 1) * n)
    return [gather(keys)[order.argsort()[mine]] for keys in encode(gather(images)[order[mine]])]
