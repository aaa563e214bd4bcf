"""Objectives: scores of a task in, the loss of each query out. Nothing here reads a value back to the host."""

import abc
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learning import parallel


class Losses(NamedTuple):
    """`rows` (N,); `log_sum_exp` (N,) of negatives / temperature; `constant`: of NCE, as this batch estimates it."""

    rows: Tensor
    log_sum_exp: Tensor | None = None
    constant: Tensor | None = None


class Objective(nn.Module, abc.ABC):
    temperature: float

    @abc.abstractmethod
    def forward(self, positive: Tensor, negative: Tensor, number: int) -> Losses:
        """positive (N,), negative (N, K) scores, -inf where one does not count, of the task with this `number`."""

    def gradients(self, rows: Tensor) -> dict[str, Tensor]:
        """What `Losses.rows` tell of the mean size of their derivatives, by name, if anything."""
        return {}

    def update(self, constants: Tensor | None) -> None:
        """Learn from a step's `Losses.constant`, (tasks,), once it is over."""


class InfoNCE(Objective):
    """Cross entropy of the positive among itself and its negatives (van den Oord et al., 2018, equation 4)."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, positive: Tensor, negative: Tensor, number: int) -> Losses:
        lse = torch.logsumexp(negative / self.temperature, dim=1)  # -log softmax = softplus(lse - positive / T)
        return Losses(F.softplus(lse - positive / self.temperature), lse)

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

    def forward(self, positive: Tensor, negative: Tensor, number: int) -> Losses:
        positive, negative = positive / self.temperature, negative / self.temperature
        lse = torch.logsumexp(negative.detach(), dim=1)
        estimate = _log_mean_exp(torch.cat([positive.detach(), lse]), negative.isfinite().sum() + len(positive))
        constant = self.constants[number]
        shift = torch.where(constant.isnan(), estimate, constant) + math.log(negative.shape[1])
        return Losses(F.softplus(shift - positive) + F.softplus(negative - shift).sum(1), lse, estimate)

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

    def forward(self, positive: Tensor, negative: Tensor, number: int) -> Losses:
        return Losses(self.offset - self.scale * positive)
