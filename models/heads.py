"""Projection heads: what stands between the trunk's features and the contrastive loss."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Kind(NamedTuple):
    hidden: int = 0  # layers
    factor: int = 1  # their width in units of the input's
    norm: bool = False  # batch norm in them
    output_norm: bool = False  # batch norm of the output
    affine: bool = True  # with weights
    unit: bool = True  # bring the output to unit length


_KINDS = {
    "linear": _Kind(),
    "linear_wo_norm": _Kind(unit=False),
    "mlp": _Kind(hidden=1),
    "mlp_bn": _Kind(hidden=1, norm=True),
    "2mlp_bn": _Kind(hidden=2, norm=True),
    "simclr": _Kind(hidden=1, norm=True, output_norm=True),
    "simsiam": _Kind(hidden=2, norm=True, output_norm=True, affine=False, unit=False),
    "byol": _Kind(hidden=1, factor=2, norm=True, unit=False),
}


def head(kind: str, dim_in: int, dim_out: int) -> nn.Module:
    """(N, dim_in) -> (N, dim_out), published widths for a ResNet-50's 2048. ValueError for an unknown `kind`."""
    if kind not in _KINDS:
        raise ValueError(f"unknown head {kind!r}; choose one of {', '.join(_KINDS)}.")
    made, dims = _KINDS[kind], [dim_in, *[dim_in * _KINDS[kind].factor] * _KINDS[kind].hidden]
    layers: list[nn.Module] = []
    for before, after in zip(dims, dims[1:]):
        layers += [nn.Linear(before, after), *[nn.BatchNorm1d(after)] * made.norm, nn.ReLU(inplace=True)]
    layers += [nn.Linear(dims[-1], dim_out), *[nn.BatchNorm1d(dim_out, affine=made.affine)] * made.output_norm]
    return nn.Sequential(*layers, *[UnitLength()] * made.unit)


def predictor(dim: int, hidden: int) -> nn.Module:
    """(N, dim) -> (N, dim) by way of `hidden` dimensions: what SimSiam and BYOL put behind the head of one side."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )


class JigsawHead(nn.Module):
    """Embeds the nine patches of an image as one (Misra & van der Maaten, CVPR 2020, section 3.1).

    Features (N, 9, dim_in) pass a `kind` of head each and, in the `order` (N, 9) given, one linear layer together:
    (N, dim_out), of unit length.
    """

    def __init__(self, kind: str, dim_in: int, dim_out: int):
        super().__init__()
        layers = head(kind, dim_in, dim_out)
        self.patch = nn.Sequential(*(layer for layer in layers if not isinstance(layer, UnitLength)))
        self.together, self.unit = nn.Linear(9 * dim_out, dim_out), UnitLength()

    def forward(self, features: Tensor, order: Tensor) -> Tensor:
        patches = self.patch(features.flatten(0, 1)).unflatten(0, order.shape)
        dealt = torch.take_along_dim(patches, order.unsqueeze(2), dim=1)
        return self.unit(self.together(dealt.flatten(1)))


class UnitLength(nn.Module):
    """Divide each row by its L2 norm, in single precision whatever the mixed-precision mode gave."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1)
