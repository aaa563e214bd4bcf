"""The contract between a method and the training loop, and the one place where tasks become a loss."""

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learning.draws import Draws
from learning.losses import info_nce
from memory import scores
from memory.task import Task

Batch = dict[str, Any]  # tensors on the device by name, and "step": the global step, an int


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass yields: `stats` scalars, `scores` (N, C) rows; `writes` is kept for `after_step`."""

    loss: Tensor
    stats: dict[str, Tensor]
    scores: Tensor
    writes: Any = None


class Method(nn.Module, abc.ABC):
    """A self-supervised method: named views in, a loss out."""

    encoder: nn.Module  # what evaluations load

    @abc.abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Loss of one batch. Must not write to any memory."""

    def param_groups(self) -> list[dict]:
        """What the optimizer trains."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def after_backward(self) -> None:
        """Edit gradients before the optimizer sees them."""

    def after_step(self, out: StepOutput) -> None:
        """Move momentum encoders and write memories."""


@dataclass(frozen=True)
class Contrast:
    """Rewrites tasks by each transform, scores them, and sums their weighted losses.

    `begin_step` is the first global step at which the transforms apply. `before` also records what the scores were
    without them, at the price of one more product of queries and negatives. Always computed in float32.
    """

    temperature: float
    transforms: Sequence[Callable[[Task, Draws], Task]] = ()
    begin_step: int = 0
    before: bool = False

    def __call__(self, tasks: Sequence[Task], draws: Draws, writes: Any = None) -> StepOutput:
        with torch.autocast(tasks[0].query.device.type, enabled=False):
            results = [self._score(task, draws) for task in tasks]
        loss = sum(task.weight * losses.mean() for task, (losses, _) in zip(tasks, results))
        rows = torch.stack([rows for _, rows in results])
        return StepOutput(loss, {"loss": loss.detach(), **scores.summary(rows.flatten(0, 1))}, rows[0], writes)

    def _score(self, task: Task, draws: Draws) -> tuple[Tensor, Tensor]:
        """Losses (N,) of one task after its transforms, and its score statistics (N, C)."""
        active = self.transforms if draws.step >= self.begin_step else ()
        rewritten = functools.reduce(lambda so_far, transform: transform(so_far, draws), active, task)
        losses, rows = self._measure(rewritten)
        if not self.before:
            return losses, rows
        with torch.no_grad():
            return losses, torch.cat([rows, self._measure(task)[1] if active else rows], 1)

    def _measure(self, task: Task) -> tuple[Tensor, Tensor]:
        positive, negative = task.scores()
        losses, lse = info_nce(positive, negative, self.temperature)
        return losses, scores.statistics(positive, negative, lse, self.temperature, task.valid)
