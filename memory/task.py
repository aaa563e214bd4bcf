"""A contrastive task: what a memory hands to the loss, and what a feature transformation rewrites."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Negatives:
    """Features (K, D) that every query is pushed away from."""

    features: Tensor

    def scores(self, query: Tensor) -> Tensor:
        """Inner products (N, K) of `query` (N, D) with each negative."""
        return query @ self.features.T


@dataclass(frozen=True)
class Task:
    """Pull `query` (N, D) towards `positive` (N, D) and away from every block of `negatives`."""

    name: str
    query: Tensor
    positive: Tensor
    negatives: tuple[Negatives, ...]
    weight: float = 1.0

    def scores(self) -> tuple[Tensor, Tensor]:
        """Positive scores (N,) and negative scores (N, K), both before the temperature."""
        blocks = [block.scores(self.query) for block in self.negatives]
        return (self.query * self.positive).sum(1), blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
