"""The training loop. It knows steps, not methods."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from learning import parallel
from learning.guard import Guard
from learning.progress import Progress


def train_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    *,
    first_step: int,
    schedule: Callable[[int], float],
    autocast: Callable[[], AbstractContextManager],
    scaler: torch.amp.GradScaler,
    guard: Guard,
    progress: Progress,
    stop: Callable[[int], bool],
) -> int:
    """Train on what `loader` has left, or until `stop(step)`, which answers all ranks alike; returns the steps done."""
    method, step = parallel.unwrap(model), first_step
    model.train()
    progress.start_epoch(step)
    for batch in loader:
        progress.data_ready()
        lr = _set_rate(optimizer, schedule(step))
        guard.begin()
        with autocast():
            out = model(batch | {"step": step})
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(out.loss).backward()
        method.after_backward(step)
        out = guard.step(out, step, batch["index"])
        method.after_step(out, step)
        guard.undo()
        progress.step_done(step, out, batch, lr)
        step += 1
        if stop(step):
            break
    return step


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if group.get("fixed_lr") else lr
    return lr
