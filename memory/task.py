"""A contrastive task: what a memory hands to the loss, and what a feature transformation rewrites."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Negatives:
    """Features (K, D) that every query is pushed away from, except where `valid` (N, K) is False.

    Where `unmixed` (N, K) is True a feature counts as it is, but must not become part of a mixture: SupCon's other
    images of the query's class.
    """

    features: Tensor
    valid: Tensor | None = None
    unmixed: Tensor | None = None

    def scores(self, query: Tensor) -> Tensor:
        """Inner products (N, K) of `query` (N, D) with each negative; -inf where it is none."""
        scores = query @ self.features.T
        return scores if self.valid is None else scores.masked_fill(~self.valid, -torch.inf)

    def thinned(self, most: int) -> "Negatives":
        """At most `most` of the features, at evenly spaced places."""
        every = slice(None, None, math.ceil(len(self.features) / most))
        masks = (mask if mask is None else mask[:, every] for mask in (self.valid, self.unmixed))
        return Negatives(self.features[every], *masks)


@dataclass(frozen=True)
class Task:
    """Pull `query` (N, D) towards `positive` (N, D) and away from every block of `negatives`, of which none may be.

    `weight` multiplies the mean loss, or as (N,) each row's share in it. `branch` sets auxiliary tasks apart
    ("jigsaw"): their statistics bear its name; those of a task that is not `shown` are left out. `keys`
    (N,) int64 is what the rows' random numbers hang on where rows are not the samples of the batch.
    """

    name: str
    query: Tensor
    positive: Tensor
    negatives: tuple[Negatives, ...] = ()
    weight: float | Tensor = 1.0
    branch: str = ""
    shown: bool = True
    keys: Tensor | None = None

    def scores(self) -> tuple[Tensor, Tensor]:
        """Positive scores (N,) and negative scores (N, K), both before the temperature; K may be 0."""
        blocks = [block.scores(self.query) for block in self.negatives]
        blocks = blocks or [self.query.new_empty(len(self.query), 0)]
        return (self.query * self.positive).sum(1), blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    def thinned(self, most: int) -> "Task":
        """The same task with at most `most` negatives of every block, at evenly spaced places."""
        return replace(self, negatives=tuple(block.thinned(most) for block in self.negatives))

    @property
    def valid(self) -> Tensor | None:
        """Which of the negative scores count, (N, K); None if all do. Either every block has a mask or none."""
        masks = [block.valid for block in self.negatives]
        return torch.cat(masks, 1) if masks and masks[0] is not None else None
