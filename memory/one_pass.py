"""All that a loss and its statistics want of the scores of many negatives, without ever holding them."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memory.scores import Scored
from memory.task import Block


def score(query: Tensor, blocks: Sequence[Block], temperature: float) -> Scored:
    """What `Scored.of` finds in the scores of `query` (N, D) with all `blocks`, which have no masks and no gradient.

    Each chunk of the negatives is read once (mixed, if it is a mixture), while its scores are in the cache: softmax
    over the chunks so far (Milakov & Gimelshein, 2018) gives the logarithm of the sum, and the sum's gradient, the
    weighted mean of the negatives, along with it. Memory does not grow with K.
    """
    chunks = chain.from_iterable(block.chunks() for block in blocks)
    log_count = math.log(sum(len(block) for block in blocks))
    if torch.is_grad_enabled() and query.requires_grad:
        return Scored(*_Score.apply(query, chunks, temperature), log_count)
    return Scored(*_pass(query, chunks, temperature, gradient=False)[0], log_count)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, chunks: Iterator[Tensor], temperature: float) -> tuple[Tensor, ...]:
        found, gradient = _pass(query, chunks, temperature, gradient=True)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, None] * ctx.saved_tensors[0], None, None


def _pass(
    query: Tensor, chunks: Iterator[Tensor], temperature: float, *, gradient: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Log-sum-exp of scores / temperature, mean, variance and maximum of the scores; the gradient of the first."""
    scaled = query / temperature
    top, total, pull = scaled.new_full((len(query), 1), -torch.inf), 0.0, torch.zeros_like(scaled)
    counts, means, squares = [], [], []
    for features in chunks:
        logits = scaled @ features.T
        above, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        logits -= top  # from here scores are close to the origin, and squares lose no digits
        counts.append(float(len(features)))
        means.append(top[:, 0] + logits.sum(1) / counts[-1])
        squares.append(torch.linalg.vector_norm(logits, dim=1).square() - counts[-1] * (means[-1] - top[:, 0]).square())
        shrunk, weights = (above - top).exp(), logits.exp_()
        total = total * shrunk + weights.sum(1, keepdim=True)
        if gradient:
            pull = torch.addmm(pull * shrunk, weights, features)
    sizes = torch.tensor(counts).to(scaled, non_blocking=True)  # a tensor made on a GPU would wait for it
    mean, variance = _joined(sizes, torch.stack(means), torch.stack(squares))
    found = (top + total.log())[:, 0], mean * temperature, variance * temperature**2, top[:, 0] * temperature
    return found, pull / total / temperature


def _joined(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the whole from parts: counts (P,), means and sums of squared deviations (P, N)."""
    count = counts.sum()
    mean = counts @ means / count
    return mean, (squares.sum(0) + counts @ (means - mean).square()) / (count - 1)
