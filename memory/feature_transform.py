"""Feature transformation: Task in, Task out (Zhu et al., "Improving Contrastive Learning by Visualizing Feature
Transformation", ICCV 2021). Positives are extrapolated into harder ones, negatives interpolated into more diverse ones.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from memory.task import CHUNK, Block, Negatives, Task

Granularity = Literal["batch", "sample", "dim"]

_BITS = 16  # resolution of a tabulated draw: 65,536 quantiles


class Draws(Protocol):
    """Where random numbers come from: functions of a key, equal on any number of processes."""

    def per_sample(self, count: int, salt: str, keys: Tensor | None = None) -> Tensor:
        """Uniform numbers (N, count) in [0, 1) that belong to the samples of this batch, or to `keys` (N,) int64."""

    def shared(self, salt: str) -> Generator:
        """A generator that every process finds in the same state at the same step."""


@functools.cache
def beta_quantiles(alpha: float, device: torch.device | str = "cpu") -> Tensor:
    """(65536,) mid-point quantiles of Beta(alpha, alpha): a uniform 16-bit index into it is a draw.

    Numerical inverse of the distribution function on [0, 1/2]; the upper half follows by symmetry. For alpha < 1 the
    density x^(alpha-1) (1-x)^(alpha-1) has a pole at 0, which substituting x = t^(1/alpha) removes.
    """
    power = min(alpha, 1.0)  # x = t^(1/power)
    t = torch.linspace(0, 0.5**power, 200_001, dtype=torch.float64)
    density = t ** (alpha / power - 1) * (1 - t ** (1 / power)) ** (alpha - 1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, t)])
    wanted = (torch.arange(2 ** (_BITS - 1), dtype=torch.float64) + 0.5) / 2**_BITS * (2 * mass[-1])
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    lower = torch.lerp(t[right - 1], t[right], share) ** (1 / power)
    return torch.cat([lower, 1 - lower.flip(0)]).float().to(device)


@dataclass(frozen=True)
class Coefficient:
    """How lambda is drawn: Beta(alpha, alpha), uniform being alpha = 1; one a batch, one a row or one an element."""

    alpha: float
    granularity: Granularity = "batch"

    def keyed(self, task: Task, draws: Draws, salt: str) -> Tensor:
        """For the rows (N, D) of a task: broadcastable to its query, row i a function of its sample alone."""
        like = task.query
        if self.granularity == "batch":
            return next(self.shared([like], draws, salt))
        uniform = draws.per_sample(1 if self.granularity == "sample" else like.shape[1], salt, task.keys)
        return self._lookup((uniform * 2**_BITS).long(), like)

    def shared(self, chunks: Iterable[Tensor], draws: Draws, salt: str) -> Iterator[Tensor]:
        """For chunks (c, D) of a memory, one after the other: broadcastable to each, equal on every process."""
        generator, lam = draws.shared(salt), None
        for like in chunks:
            if lam is None or self.granularity != "batch":
                shape = {"batch": (1, 1), "sample": (len(like), 1), "dim": tuple(like.shape)}[self.granularity]
                index = torch.randint(2**_BITS, shape, generator=generator, device=like.device, dtype=torch.int32)
                lam = self._lookup(index, like)
            yield lam

    def _lookup(self, index: Tensor, like: Tensor) -> Tensor:
        quantiles = beta_quantiles(self.alpha, like.device)  # twice as fast as indexing on a CPU
        return quantiles.index_select(0, index.flatten()).view(index.shape).to(like.dtype)


@dataclass(frozen=True)
class PositiveTransform:
    """q' = lam q + (1 - lam) k, k' = lam k + (1 - lam) q.

    Extrapolation draws lam = 1 + Beta(a, a): the pair moves apart along the line that joins it, and for a scalar lam
    and unit vectors the score S falls to S - 2 lam (lam - 1)(1 - S). Interpolation draws lam = Beta(a, a), which makes
    the pair easier: the paper's ablation. q' is also what the negatives meet. The gradient flows to q through both
    factors.
    """

    coefficient: Coefficient
    extrapolate: bool = True
    normalize: bool = False

    def __call__(self, task: Task, draws: Draws) -> Task:
        query, positive = task.query, task.positive
        lam = self.coefficient.keyed(task, draws, f"{task.name}/positive") + float(self.extrapolate)
        moved = torch.lerp(positive, query, lam), torch.lerp(query, positive, lam)
        if self.normalize:
            moved = tuple(F.normalize(side, dim=1) for side in moved)
        return replace(task, query=moved[0], positive=moved[1])


@dataclass(frozen=True)
class Mixture(Block):
    """lam n_j + (1 - lam) n_other(j) for all n_j of `source`, made when they are asked for: no second copy of a memory.

    `coefficients` yields lam chunk by chunk, the same ones every time.
    """

    source: Block
    other: Tensor
    coefficients: Callable[[], Iterator[Tensor]]
    normalize: bool = False
    valid: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    def chunks(self) -> Iterator[Tensor]:
        features = self.source.features
        for chunk, other, lam in zip(self.source.chunks(), self.other.split(CHUNK), self.coefficients()):
            mixed = torch.lerp(features.index_select(0, other), chunk, lam)
            yield F.normalize(mixed, dim=1) if self.normalize else mixed

    @property
    def features(self) -> Tensor:
        """All at once, (K, D)."""
        return torch.cat([*self.chunks()])

    @property
    def learnt(self) -> bool:
        return self.source.learnt


@dataclass(frozen=True)
class NegativeTransform:
    """n'_j = lam n_j + (1 - lam) n_pi(j), pi a fresh permutation, lam ~ Beta(a, a).

    The mixed negatives replace the originals, or join them with `append` (the paper's "2K" ablation). Memories
    keep what they hold: only the task is rewritten. A mixture counts as a negative of a query only if both its parts
    do, so in a batch that serves as its own negatives no mixture contains the query's own image.
    """

    coefficient: Coefficient
    append: bool = False
    normalize: bool = False

    def __call__(self, task: Task, draws: Draws) -> Task:
        mixed = tuple(self._mix(block, draws, f"{task.name}/{i}") for i, block in enumerate(task.negatives))
        unmixed = (Negatives(b.features, b.unmixed) for b in task.negatives if b.unmixed is not None)
        return replace(task, negatives=(*(task.negatives if self.append else unmixed), *mixed))

    def _mix(self, block: Block, draws: Draws, salt: str) -> Block:
        generator, device = draws.shared(f"{salt}/permutation"), block.features.device
        other = torch.randperm(len(block), generator=generator, device=device)
        pure = block.valid if block.unmixed is None else block.valid & ~block.unmixed
        valid = None if pure is None else pure & pure[:, other]
        return Mixture(
            block,
            other,
            lambda: self.coefficient.shared(block.chunks(), draws, f"{salt}/negative"),
            self.normalize,
            valid,
        )
