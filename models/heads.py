"""Projection heads: what stands between the trunk's features and the contrastive loss."""

import torch.nn.functional as F
from torch import Tensor, nn

# kind: (hidden layers, batch norm in them, batch norm of the output, unit length output)
_KINDS = {
    "linear": (0, False, False, True),
    "linear_wo_norm": (0, False, False, False),
    "mlp": (1, False, False, True),
    "mlp_bn": (1, True, False, True),
    "2mlp_bn": (2, True, False, True),
    "simclr": (1, True, True, True),
}


def head(kind: str, dim_in: int, dim_out: int) -> nn.Module:
    """(N, dim_in) -> (N, dim_out); hidden layers keep the input's width. ValueError for an unknown `kind`."""
    if kind not in _KINDS:
        raise ValueError(f"unknown head {kind!r}; choose one of {', '.join(_KINDS)}.")
    hidden, norm, output_norm, unit = _KINDS[kind]
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Linear(dim_in, dim_in), *([nn.BatchNorm1d(dim_in)] * norm), nn.ReLU(inplace=True)]
    layers += [nn.Linear(dim_in, dim_out), *([nn.BatchNorm1d(dim_out)] * output_norm), *([UnitLength()] * unit)]
    return nn.Sequential(*layers)


class UnitLength(nn.Module):
    """Divide each row by its L2 norm, in single precision whatever the mixed-precision mode gave."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1)
