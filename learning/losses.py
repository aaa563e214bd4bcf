"""Objectives, as pure functions of scores. Nothing here reads a value back to the host."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(positive: Tensor, negative: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al., 2018, eq. 4): cross entropy of the positive among itself and its negatives.

    positive: (N,) scores; negative: (N, K) scores. Returns the loss of each query (N,), and the log-sum-exp
    (N,) of negative / temperature, of which -log softmax = softplus(lse - positive / T) and the score statistics share.
    """
    lse = torch.logsumexp(negative / temperature, dim=1)
    return F.softplus(lse - positive / temperature), lse
