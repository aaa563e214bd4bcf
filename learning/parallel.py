"""What processes say to each other. With one process each call is a no-op."""

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def device(wanted: str = "auto", gpu: int | None = None) -> torch.device:
    """The device of this process: the GPU `launch` chose, or of a single process `gpu` or the first; else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if gpu is not None and world_size() == 1:
        torch.cuda.set_device(gpu)
    return torch.device("cuda", torch.cuda.current_device())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if dist.is_initialized() else 1


def share() -> dict[str, int]:
    """Which part of the images is this process's, as loaders take it."""
    return {"rank": rank(), "world_size": world_size()}


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


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank; its ValueError or OSError is a ValueError on all."""
    answer = error = None
    if is_main():
        try:
            answer = function()
        except (ValueError, OSError) as refused:
            error = str(refused)
    answer, error = broadcast_object((answer, error))
    if error is not None:
        raise ValueError(error)
    return answer


def any_rank(flag: bool) -> bool:
    """True everywhere as soon as `flag` is true somewhere. All ranks must call it at the same step."""
    if world_size() == 1:
        return flag
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(all_sum(torch.tensor(float(flag), device=where)) > 0)


class Agreement:
    """Lets all processes stop after the same step, whichever of them wants to. It asks no device, so nothing waits.

    The group's store holds a step, which nobody passes without having moved it on, and the signal for which all stop
    there, or 0. Whoever comes to the step first moves it on by about a second; who wants to stop puts the signal there.
    """

    def __init__(self):
        self.line, self.limit, self.signal = "", 0, 0
        self.first, self.began = None, time.perf_counter()

    def __call__(self, step: int, wanted: int) -> int:
        """The signal for which all stop after `step`, or 0; `wanted` is this process's. To be called at every step."""
        if world_size() == 1:
            return wanted
        while not self.signal and (wanted or step >= self.limit):
            ahead = 0 if wanted else self._steps_per_second(step)
            proposed = f"{max(step, self.limit) + ahead} {wanted}"
            found = dist.distributed_c10d._get_default_store().compare_set("stop", self.line, proposed)
            self.line = found.decode()
            self.limit, self.signal = map(int, self.line.split())
        return self.signal if step >= self.limit else 0

    def _steps_per_second(self, step: int) -> int:
        self.first = step if self.first is None else self.first
        return max(int((step - self.first) / (time.perf_counter() - self.began)), 1)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value` (picklable), in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def everywhere(flag: Tensor) -> Tensor:
    """Whether `flag`, a scalar on the device, is true on every rank; the host does not wait for the answer."""
    return gather(flag[None]).all()


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Concatenate `x` (n, ...) over ranks, without gradient; n is the same on every rank."""
    if world_size() == 1:
        return x
    whole = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


class _Gather(torch.autograd.Function):
    """`gather` with a gradient: every rank's share of it, added up, for the rows that came from here."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return own_rows(all_sum(grad.clone(memory_format=torch.contiguous_format)))


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate `x` (n, ...) over ranks, letting the gradient flow back to all of them.

    With each rank's loss averaged over its own rows, and gradients averaged over ranks as DDP does, the gradient is
    that of the mean over the global batch.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def own_rows(x: Tensor) -> Tensor:
    """This rank's rows of `x` (world * n, ...), which follows the order of `gather`."""
    return x.chunk(world_size())[rank()]


def own_share(x: Tensor) -> Tensor:
    """Every world-th row of `x`, which is the same on all ranks: together they have each row once."""
    return x[rank() :: world_size()]


class _Mean(torch.autograd.Function):
    """Mean over ranks, and of the gradients over ranks on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_mean(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_mean(grad.clone(memory_format=torch.contiguous_format))


def mean_with_gradient(x: Tensor) -> Tensor:
    """Mean of `x` over ranks; its gradient is right where gradients are averaged over ranks, as DDP does."""
    return x if world_size() == 1 else _Mean.apply(x)


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


def each_rank(x: Tensor) -> Tensor:
    """Every rank's `x`, a row each."""
    return gather(x[None])


def own_or_mean(rows: Tensor) -> Tensor:
    """This rank's row of `each_rank`; the mean where the rows are of another number of ranks."""
    return rows[rank()] if len(rows) == world_size() else rows.mean(0)


@contextmanager
def averaged_running_statistics(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every rank has the mean of all ranks' batch-norm running statistics. Yields `each_rank` of its own.

    They are linear in what each rank has seen, so averaging before they are used equals averaging every step. Outside,
    each rank goes on with its own: when somebody looks changes nothing, not even by rounding.
    """
    buffers = _running_statistics(module)
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        all_mean(buffer)
    try:
        yield [each_rank(x) for x in own]
    finally:
        for buffer, x in zip(buffers, own):
            buffer.copy_(x)


def set_running_statistics(module: nn.Module, rows: list[Tensor]) -> None:
    """Give every rank its own statistics back, where `rows` (of `averaged_running_statistics`) has them."""
    for buffer, x in zip(_running_statistics(module), rows):
        buffer.copy_(own_or_mean(x))


def _running_statistics(module: nn.Module) -> list[Tensor]:
    return [x for name, x in module.named_buffers() if name.endswith(("running_mean", "running_var"))]


def deal(x: Tensor, order: Tensor) -> Tensor:
    """Of the global batch whose rows `x` (n, ...) are here: this rank's rows once it is in `order` (world * n,).

    Every row goes to the one rank that needs it. `order` is on the CPU and the same everywhere.
    """
    if world_size() == 1:
        return _rows(x, order)
    n = len(x)
    leaving = (order // n == rank()).nonzero().squeeze(1)  # where rows from here go, rank by rank
    source = own_rows(order) // n
    dealt = torch.empty_like(x, memory_format=torch.contiguous_format)
    received, sent = (ranks.bincount(minlength=world_size()).tolist() for ranks in (source, leaving // n))
    dist.all_to_all_single(dealt, _rows(x, order[leaving] - rank() * n), received, sent)
    return _rows(dealt, source.argsort(stable=True).argsort())  # they came rank by rank


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], contiguous; `index` is on the CPU, and the host does not wait for the device."""
    return x.index_select(0, index.to(x.device, non_blocking=True)).contiguous()


def dealt_back(x: Tensor, order: Tensor) -> Tensor:
    """The global batch (world * n, ...) in its own order, from `x` (n, ...), this rank's rows of it in `order`."""
    return gather(x)[order.argsort()]


def accumulating(module: nn.Module, more: bool) -> AbstractContextManager:
    """In which a backward pass leaves gradients on their ranks, if there are `more` to come before they are used."""
    return module.no_sync() if more and isinstance(module, DistributedDataParallel) else nullcontext()
