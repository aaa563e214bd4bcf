"""The contract between a method and the training loop, and the one place where tasks become a loss."""

import abc
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from learning import parallel
from learning.draws import Draws
from learning.losses import Losses, Objective
from memory import look, scores
from memory.task import Task

Batch = dict[str, Any]  # tensors on the device by name, and "step": the global step, an int
Schedule = Callable[[int], float]  # a number for every global step


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass yields: `stats` scalars, `scores` (N, C) rows; `writes` is kept for `after_step`.

    `losses` are the tasks' shares, by name. `ok`, a scalar on the device, becomes False if the step does not count.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    scores: Tensor
    writes: Sequence[Tensor] | None = None  # of all processes, row by row
    constants: Tensor | None = None  # NCE's, as this batch estimates them
    losses: dict[str, Tensor] = field(default_factory=dict)
    ok: Tensor = torch.tensor(True)
    looked: dict[str, Tensor] = field(default_factory=dict)  # what `look.measured` takes, where it is time to look

    @staticmethod
    def joined(parts: Sequence["StepOutput"]) -> "StepOutput":
        """One output of a step whose batch came in `parts` of equal size: rows in turn, and means of the rest."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def mean(values: Iterable[Tensor]) -> Tensor:
            return torch.stack([*values]).mean(0)

        return StepOutput(
            mean(out.loss for out in parts),
            {name: mean(out.stats[name] for out in parts) for name in first.stats},
            torch.cat([out.scores for out in parts]),
            first.writes and [torch.cat(rows) for rows in zip(*(out.writes for out in parts))],
            None if first.constants is None else mean(out.constants for out in parts),
            {name: mean(out.losses[name] for out in parts) for name in first.losses},
            looked={name: torch.cat([out.looked[name] for out in parts]) for name in first.looked},
        )


class Method(nn.Module, abc.ABC):
    """A self-supervised method: named views in, a loss out. `step` is the number of optimizer steps before this one."""

    encoder: nn.Module  # what evaluations load

    @abc.abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Loss of one batch. Must not write to any memory."""

    def param_groups(self) -> list[dict]:
        """What the optimizer trains. A group with "fixed_lr" keeps the peak learning rate throughout."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def after_backward(self, step: int) -> None:
        """Edit gradients before the optimizer sees them."""

    def after_step(self, out: StepOutput, step: int) -> None:
        """Move momentum encoders, and write memories if `out.ok`; the former is taken back otherwise."""


@dataclass(frozen=True)
class Rewriting:
    """Feature transformation: which transforms apply, and when.

    They leave the branches `untouched` alone, and everything before the global step `begin_step`. With `before` the
    scores of the original are recorded too, at the price of one more product of queries and negatives. Every
    `look_every` steps (0: never) a sample of the scores themselves is kept for a log line.
    """

    transforms: Sequence[Callable[[Task, Draws], Task]] = ()
    begin_step: int = 0
    untouched: tuple[str, ...] = ()
    before: bool = False
    look_every: int = 0

    def __call__(self, task: Task, draws: Draws) -> Task:
        if draws.step < self.begin_step or task.branch in self.untouched:
            return task
        return functools.reduce(lambda so_far, transform: transform(so_far, draws), self.transforms, task)

    def record(
        self, measure: Callable[[Task], tuple[Any, Tensor | None]], task: Task, draws: Draws
    ) -> tuple[Any, Tensor | None]:
        """`measure` of the rewritten task: a result, and score rows (N, C); those of the original beside them.

        A task that is not `shown` has no rows.
        """
        rewritten = self(task, draws)
        result, rows = measure(rewritten)
        if not (self.before and task.shown):
            return result, rows
        with torch.no_grad():
            return result, torch.cat([rows, measure(task)[1] if rewritten is not task else rows], 1)

    @torch.no_grad()
    def look(self, scored: Callable[[Task], tuple[Tensor, Tensor]], task: Task, draws: Draws) -> dict[str, Tensor]:
        """At a step to look at, of a task: `scored` after and before rewriting it, in rows (N, 1 + K) that begin with
        the positive, and the embeddings of both sides (N, D), of unit length. Nothing at other steps.
        """
        if not self.look_every or (draws.step + 1) % self.look_every:
            return {}
        versions = {"scores": self(task, draws)} | ({"before_scores": task} if self.before else {})
        pairs = {name: scored(version) for name, version in versions.items()}
        rows = {name: torch.cat([positive[:, None], negative], 1) for name, (positive, negative) in pairs.items()}
        sides = {"queries": task.query, "keys": task.positive}
        return rows | {name: normalize(side.float(), dim=1) for name, side in sides.items()}


class Contrast(nn.Module):
    """Rewrites tasks, scores them, and sums their weighted losses. Always computed in float32."""

    def __init__(self, objective: Objective, rewriting: Rewriting | None = None):
        super().__init__()
        self.objective, self.rewriting = objective, rewriting or Rewriting()

    def forward(
        self, tasks: Sequence[Task], draws: Draws, writes: Any = None, embeddings: Tensor | None = None
    ) -> StepOutput:
        """The rows of the first task are those that are recorded, and its queries those whose spread is shown, unless
        there are `embeddings` (N, D).
        """
        with torch.autocast(tasks[0].query.device.type, enabled=False):
            measured = [
                self.rewriting.record(functools.partial(self._measure, number=number), task, draws)
                for number, task in enumerate(tasks)
            ]
            looked = self.rewriting.look(lambda task: task.thinned(look.NEGATIVES).scores(), tasks[0], draws)
        shares = [(task.weight * losses.rows).mean() for task, (losses, _) in zip(tasks, measured)]
        loss = sum(shares)
        embeddings = (tasks[0].query if embeddings is None else embeddings).detach().float()
        spread = scores.spread(parallel.gather(normalize(embeddings, dim=1)))
        stats = {"loss": loss.detach(), "feature_std": spread}
        shown = [(task.branch, losses.rows, rows) for task, (losses, rows) in zip(tasks, measured) if task.shown]
        for branch in dict.fromkeys(branch for branch, *_ in shown):
            losses, rows = (torch.cat(of) for of in zip(*(of for place, *of in shown if place == branch)))
            values = scores.summary(rows) | self.objective.gradients(losses)
            stats |= {f"{branch}_{name}".lstrip("_"): value for name, value in values.items()}
        constants = [losses.constant for losses, _ in measured if losses.constant is not None]
        return StepOutput(
            loss,
            stats,
            measured[0][1],
            writes,
            torch.stack(constants) if constants else None,
            {task.name: share.detach() for task, share in zip(tasks, shares)},
            looked=looked,
        )

    def _measure(self, task: Task, number: int) -> tuple[Losses, Tensor | None]:
        losses = self.objective(task, number)
        if not task.shown:
            return losses, None
        return losses, scores.statistics(losses.positive, losses.scored, self.objective.temperature)

    def after_step(self, out: StepOutput) -> None:
        """To be called once a step's weights have been updated."""
        self.objective.update(out.constants)
