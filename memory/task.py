"""A contrastive task: what a memory hands to the loss, and what a feature transformation rewrites."""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 4096  # negatives that are worked on at a time: with their scores they fit into a cache


class Block(abc.ABC):
    """K features of D numbers that every query is pushed away from, except where `valid` (N, K) is False.

    Where `unmixed` (N, K) is True a feature counts as it is, but must not become part of a mixture: SupCon's other
    images of the query's class.
    """

    features: Tensor
    valid: Tensor | None
    unmixed: Tensor | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """K."""

    @abc.abstractmethod
    def chunks(self) -> Iterator[Tensor]:
        """The features, in order, (CHUNK, D) at a time."""

    @property
    @abc.abstractmethod
    def learnt(self) -> bool:
        """Whether the features have a gradient."""

    def thinned(self, most: int) -> "Negatives":
        """At most `most` of them, at evenly spaced places. No second copy of a memory is made on the way."""
        every = math.ceil(len(self) / most)
        features = [chunk[-i * CHUNK % every :: every] for i, chunk in enumerate(self.chunks())]
        masks = (mask if mask is None else mask[:, ::every] for mask in (self.valid, self.unmixed))
        return Negatives(torch.cat(features), *masks)

    def scores(self, query: Tensor) -> Tensor:
        """Inner products (N, K) of `query` (N, D) with each negative; -inf where it is none."""
        scores = query @ self.features.T
        return scores if self.valid is None else scores.masked_fill(~self.valid, -torch.inf)


@dataclass(frozen=True)
class Negatives(Block):
    """Those that a memory or a batch holds, (K, D)."""

    features: Tensor
    valid: Tensor | None = None
    unmixed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.features.split(CHUNK))

    @property
    def learnt(self) -> bool:
        return self.features.requires_grad


@dataclass(frozen=True)
class Task:
    """Pull `query` (N, D) towards `positive` (N, D) and away from every block of `negatives`, of which none may be.

    `weight` multiplies the mean loss, or as (N,) each row's share in it. `branch` sets auxiliary tasks apart
    ("jigsaw"): their statistics bear its name; those of a task that is not `shown` are left out. `keys`
    (N,) int64 is what the rows' random numbers hang on where rows are not the samples of the batch. A positive that is
    `apart` is compared with the negatives and not one among them: the mean of several that are.
    """

    name: str
    query: Tensor
    positive: Tensor
    negatives: tuple[Block, ...] = ()
    weight: float | Tensor = 1.0
    branch: str = ""
    shown: bool = True
    keys: Tensor | None = None
    apart: bool = False

    def scores(self) -> tuple[Tensor, Tensor]:
        """Positive scores (N,) and negative scores (N, K), both before the temperature; K may be 0."""
        blocks = [block.scores(self.query) for block in self.negatives]
        blocks = blocks or [self.query.new_empty(len(self.query), 0)]
        return self.positive_scores(), blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    def thinned(self, most: int) -> "Task":
        """The same with at most `most` negatives of every block, at evenly spaced places."""
        return replace(self, negatives=tuple(block.thinned(most) for block in self.negatives))

    def positive_scores(self) -> Tensor:
        return (self.query * self.positive).sum(1)

    @property
    def valid(self) -> Tensor | None:
        """Which of the negative scores count, (N, K); None if all do. Either every block has a mask or none."""
        masks = [block.valid for block in self.negatives]
        return torch.cat(masks, 1) if masks and masks[0] is not None else None
