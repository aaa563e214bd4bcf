"""AlexNet with batch norm, of any width and number of input channels, as CMC has it (Tian et al., ECCV 2020)."""

import torch.nn.functional as F
from torch import nn

from models.layered import Layered


class AlexNet(Layered):
    """Five convolutions and two full layers, each with batch norm and ReLU: images -> features (N, 4096 * width).

    There is no dropout, no local response norm and no group. `width` multiplies every channel count. Pictures may
    have any size: the last map is pooled to 6x6, at 224 px by the published windows. The small stem is not published:
    a first convolution of 3x3 and stride 1 instead of 11x11 and stride 4, for pictures of 32 to 64 pixels.
    """

    sides = {"conv1": 10, "conv2": 6, "conv3": 5, "conv4": 5, "conv5": None, "fc6": None, "fc7": None}
    shrink = staticmethod(F.adaptive_max_pool2d)

    def __init__(self, *, width: float = 1.0, in_channels: int = 3, small_stem: bool = False):
        super().__init__()
        dims = [int(width * dim) for dim in (96, 256, 384, 384, 256, 4096, 4096)]
        if not all(dims):
            raise ValueError(f"a width of {width:g} leaves AlexNet without channels; raise --width.")
        kernel, stride, padding = (3, 1, 1) if small_stem else (11, 4, 2)
        self.conv1 = _conv(in_channels, dims[0], kernel, stride, padding, nn.MaxPool2d(3, 2, ceil_mode=True))
        self.conv2 = _conv(dims[0], dims[1], 5, 1, 2, nn.MaxPool2d(3, 2, ceil_mode=True))
        self.conv3 = _conv(dims[1], dims[2], 3, 1, 1)
        self.conv4 = _conv(dims[2], dims[3], 3, 1, 1)
        self.conv5 = _conv(dims[3], dims[4], 3, 1, 1, nn.AdaptiveMaxPool2d(6))
        self.fc6 = _full(36 * dims[4], dims[5])
        self.fc7 = _full(dims[5], dims[6])
        self.feature_dim = dims[6]


def _conv(dim_in: int, dim_out: int, kernel: int, stride: int, padding: int, *pool: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim_out), nn.ReLU(inplace=True), *pool)


def _full(dim_in: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out), nn.ReLU(inplace=True))
