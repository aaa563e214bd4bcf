"""An exponential moving average of another encoder: MoCo's key encoder (He et al. 2020, equation 2), BYOL's target."""

import copy

import torch
from torch import nn


class MomentumEncoder(nn.Module):
    """A slowly moving copy of `source` that never receives gradients.

    Only parameters are averaged. The running statistics of its batch norms are its own, as its batches are.
    """

    def __init__(self, source: nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(source).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *inputs):
        return self.encoder(*inputs)

    @torch.no_grad()
    def update(self, source: nn.Module, momentum: float) -> None:
        """key <- momentum * key + (1 - momentum) * source, in place."""
        torch._foreach_lerp_(list(self.encoder.parameters()), list(source.parameters()), 1 - momentum)
