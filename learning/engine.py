"""The training loop. It knows steps, not methods."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from learning import parallel
from learning.guard import Guard
from learning.methods.base import StepOutput
from learning.progress import Progress


def train_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    *,
    first_step: int,
    accumulate: int = 1,
    schedule: Callable[[int], float],
    autocast: Callable[[], AbstractContextManager],
    guard: Guard,
    progress: Progress,
    stop: Callable[[int], bool],
) -> int:
    """Train on the rest of `loader`, `accumulate` batches a step, or until all ranks `stop`; returns the steps done."""
    method, step = parallel.unwrap(model), first_step
    model.train()
    progress.start_epoch(step)
    for parts in zip(*[iter(loader)] * accumulate):
        progress.data_ready()
        lr = _set_rate(optimizer, schedule(step))
        guard.begin()
        optimizer.zero_grad(set_to_none=True)
        out = _forward_backward(model, [part | {"step": step} for part in parts], autocast, guard.scaler)
        method.after_backward(step)
        progress.gradients.observe(step, method, guard)
        index = [part["index"] for part in parts]
        out = guard.step(out, step, torch.cat(index))
        method.after_step(out, step)
        guard.undo()
        progress.step_done(step, out, index, lr)
        step += 1
        if stop(step):
            break
    return step


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if group.get("fixed_lr") else lr
    return lr


def _forward_backward(
    model: nn.Module,
    parts: Sequence[dict[str, Any]],
    autocast: Callable[[], AbstractContextManager],
    scaler: torch.amp.GradScaler,
) -> StepOutput:
    """Gradients of the mean loss of all parts, exchanged between processes once, and what the parts yield together."""
    outs = []
    for number, part in enumerate(parts, start=1):
        with parallel.accumulating(model, more=number < len(parts)):
            with autocast():
                out = model(part)
            scaler.scale(out.loss / len(parts)).backward()
        outs.append(replace(out, loss=out.loss.detach()))
    return StepOutput.joined(outs)
