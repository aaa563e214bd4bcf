"""Objectives: a task in, the loss of each query out. Nothing here reads a value back to the host."""

import abc
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learning import parallel
from memory import one_pass
from memory.scores import Scored
from memory.task import Task


class Losses(NamedTuple):
    """`rows` (N,), `positive` scores (N,), what became of the negatives'; `constant`: of NCE, as this batch has it."""

    rows: Tensor
    positive: Tensor
    scored: Scored | None = None
    constant: Tensor | None = None


class Objective(nn.Module, abc.ABC):
    temperature: float

    @abc.abstractmethod
    def forward(self, task: Task, number: int) -> Losses:
        """Of each query of the task with this `number`."""

    def gradients(self, rows: Tensor) -> dict[str, Tensor]:
        """What `Losses.rows` tell of the mean size of their derivatives, by name, if anything."""
        return {}

    def update(self, constants: Tensor | None) -> None:
        """Learn from a step's `Losses.constant`, (tasks,), once it is over."""


class InfoNCE(Objective):
    """Cross entropy of the positive among itself and its negatives (van den Oord et al., 2018, equation 4).

    With `one_pass`, negatives without a gradient and without masks are read once and their scores are not kept.
    """

    def __init__(self, temperature: float, one_pass: bool = True):
        super().__init__()
        self.temperature, self.one_pass = temperature, one_pass

    def forward(self, task: Task, number: int) -> Losses:
        if self.one_pass and not any(block.learnt or block.valid is not None for block in task.negatives):
            positive, scored = task.positive_scores(), one_pass.score(task.query, task.negatives, self.temperature)
        else:
            positive, negative = task.scores()
            scored = Scored.of(negative, self.temperature, task.valid)
        rows = scored.log_sum_exp - positive / self.temperature
        return Losses(rows if task.apart else F.softplus(rows), positive, scored)  # softplus: -log softmax

    def gradients(self, rows: Tensor) -> dict[str, Tensor]:
        """By the positive score: (1 - p) / T where p = exp(-loss) is the positive's share of the softmax."""
        return {"positive_gradient": -torch.expm1(-rows.detach()).mean() / self.temperature}


class NCE(Objective):
    """Noise-contrastive estimation (Gutmann & Hyvarinen, 2010) as InsDis uses it (Wu et al., CVPR 2018, equation 6).

    A score s has probability exp(s / T) / Z, noise is uniform over the data, and each query has K noise samples. Z is
    the number of data times the mean of exp(s / T), and that number cancels in the ratio of the two. Where the
    published code fixes the mean by its first batch, it is a running one here, of momentum .99 per step and task, in
    logarithms, over all processes.
    """

    def __init__(self, temperature: float, tasks: int):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("constants", torch.full((tasks,), torch.nan))  # log mean exp; nan: none seen yet

    def forward(self, task: Task, number: int) -> Losses:
        positive, negative = task.scores()
        scored = Scored.of(negative.detach(), self.temperature, task.valid)
        logits, noise = positive / self.temperature, negative / self.temperature
        known = torch.cat([logits.detach(), scored.log_sum_exp])
        estimate = _log_mean_exp(known, negative.isfinite().sum() + len(positive))
        constant = self.constants[number]
        shift = torch.where(constant.isnan(), estimate, constant) + math.log(negative.shape[1])
        return Losses(F.softplus(shift - logits) + F.softplus(noise - shift).sum(1), positive, scored, estimate)

    @torch.no_grad()
    def update(self, constants: Tensor) -> None:
        moved = torch.logaddexp(self.constants + math.log(0.99), constants + math.log(0.01))
        self.constants.copy_(torch.where(self.constants.isnan(), constants, moved))


def _log_mean_exp(logits: Tensor, count: Tensor) -> Tensor:
    sums = parallel.gather(torch.stack([logits.logsumexp(0), count.log()])[None])
    return sums[:, 0].logsumexp(0) - sums[:, 1].logsumexp(0)


class Cosine(Objective):
    """offset - scale * cosine of query and positive, both of unit length; no negatives (SimSiam 0, 1; BYOL 2, 2)."""

    temperature = 1.0

    def __init__(self, offset: float, scale: float):
        super().__init__()
        self.offset, self.scale = offset, scale

    def forward(self, task: Task, number: int) -> Losses:
        positive = task.positive_scores()
        return Losses(self.offset - self.scale * positive, positive)
