"""Projection heads: what stands between the trunk's features and the contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# kind: (hidden layers, their width in units of the input's, batch norm in them, batch norm of the output and whether
# that has weights, unit length output)
_KINDS = {
    "linear": (0, 1, False, None, True),
    "linear_wo_norm": (0, 1, False, None, False),
    "mlp": (1, 1, False, None, True),
    "mlp_bn": (1, 1, True, None, True),
    "2mlp_bn": (2, 1, True, None, True),
    "simclr": (1, 1, True, True, True),
    "simsiam": (2, 1, True, False, False),
    "byol": (1, 2, True, None, False),
}


def head(kind: str, dim_in: int, dim_out: int) -> nn.Module:
    """(N, dim_in) -> (N, dim_out), published widths for a ResNet-50's 2048. ValueError for an unknown `kind`."""
    if kind not in _KINDS:
        raise ValueError(f"unknown head {kind!r}; choose one of {', '.join(_KINDS)}.")
    hidden, factor, norm, output_norm, unit = _KINDS[kind]
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Linear(dim_in, factor * dim_in)]
        dim_in *= factor
        layers += [*([nn.BatchNorm1d(dim_in)] * norm), nn.ReLU(inplace=True)]
    layers += [nn.Linear(dim_in, dim_out), *([UnitLength()] * unit)]
    if output_norm is not None:
        layers.insert(-1 if unit else len(layers), nn.BatchNorm1d(dim_out, affine=output_norm))
    return nn.Sequential(*layers)


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
        self.together = nn.Linear(9 * dim_out, dim_out)

    def forward(self, features: Tensor, order: Tensor) -> Tensor:
        patches = self.patch(features.flatten(0, 1)).unflatten(0, order.shape)
        dealt = torch.take_along_dim(patches, order.unsqueeze(2), dim=1)
        return F.normalize(self.together(dealt.flatten(1)).float(), dim=1)


class UnitLength(nn.Module):
    """Divide each row by its L2 norm, in single precision whatever the mixed-precision mode gave."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1)
