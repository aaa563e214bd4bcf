"""Stores of past embeddings. Reading is pure; writing happens once, after the optimizer's step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory.task import Negatives


class Queue(nn.Module):
    """The most recent `size` keys, first in first out (He et al., CVPR 2020, section 3.2).

    The position is a buffer, so a resumed run goes on where it stopped, and `size` may be any number: a batch
    that does not divide it wraps around. Until it is full, the free slots hold random unit vectors.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("written", torch.zeros((), dtype=torch.long))

    def read(self) -> Negatives:
        """The (K, D) keys themselves, not a copy: nothing may write before the backward pass is over."""
        return Negatives(self.keys)

    @torch.no_grad()
    def write(self, keys: Tensor, ok: Tensor) -> None:
        """Replace the oldest entries by `keys` (n, D); of more than `size` keys the last ones stay.

        Nothing changes unless `ok`, a scalar on the device.
        """
        size = len(self.keys)
        kept = keys[-size:]
        first = self.written + (len(keys) - len(kept))
        slots = (first + torch.arange(len(kept), device=keys.device)) % size
        self.keys.index_copy_(0, slots, torch.where(ok, kept.to(self.keys.dtype), self.keys[slots]))
        self.written.add_(len(keys) * ok)

    def fill(self) -> Tensor:
        """Share of the slots that hold real keys, in [0, 1], as a scalar on the device."""
        return (self.written / len(self.keys)).clamp(max=1.0)

    def age(self, n: int) -> Tensor:
        """How many steps ago real keys were written, on average, if n come with every step; the newest count as 1."""
        filled = self.written.clamp(max=len(self.keys))
        whole = filled // n  # steps of which all keys are here
        return (whole + 1) * (1 - n * whole / (2 * filled))


class Bank(nn.Module):
    """One slowly moving embedding for every image of the data (Wu et al., CVPR 2018, section 3.1).

    Rows begin as random vectors of expected length 1, uniform in each coordinate, as published. `seen` tells which
    have been written: there is no sense in drawing an image towards a random vector, and none in averaging with it.
    """

    def __init__(self, size: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("rows", (2 * torch.rand(size, dim) - 1) * (3 / dim) ** 0.5)
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))

    def read(self, index: Tensor, drawn: Tensor) -> tuple[Tensor, Negatives]:
        """What the bank remembers of the images `index` (N,), and the rows `drawn` (K,) as everybody's negatives.

        All queries share the K draws, which makes scoring one product with (K, D) where draws of their own would take
        (N, K, D); an image's own row is not among its negatives.
        """
        return self.rows[index], Negatives(self.rows[drawn], valid=index[:, None] != drawn)

    @torch.no_grad()
    def write(self, index: Tensor, features: Tensor, ok: Tensor) -> None:
        """rows <- unit length of momentum * rows + (1 - momentum) * features, for images `index` (n,), features (n, D).

        A row that is written for the first time is replaced. Of an image that occurs repeatedly the first counts.
        Nothing changes unless `ok`, a scalar on the device.
        """
        first = (index[:, None] == index).byte().argmax(1)
        rows, seen = self.rows[index], self.seen[index]
        moved = torch.lerp(features[first].to(rows.dtype), rows, self.momentum * seen[:, None])
        self.rows.index_copy_(0, index, torch.where(ok, F.normalize(moved, dim=1), rows))
        self.seen.index_copy_(0, index, seen | ok)
