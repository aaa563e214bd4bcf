"""ResNet and ResNeXt trunks of any depth, width and number of input channels (He et al. 2016; Xie et al. 2017).

Parameters carry torchvision's names and, at width 1, torchvision's shapes, so its weights load without conversion.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layered import Layered

# name: (block, blocks per stage, groups, channels per group at 64 planes)
ARCHITECTURES = {
    "resnet18": ("basic", (2, 2, 2, 2), 1, 64),
    "resnet34": ("basic", (3, 4, 6, 3), 1, 64),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 1, 64),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 1, 64),
    "resnet152": ("bottleneck", (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": ("bottleneck", (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": ("bottleneck", (3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": ("bottleneck", (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": ("bottleneck", (3, 4, 23, 3), 64, 4),
    "resnext152_32x4d": ("bottleneck", (3, 8, 36, 3), 32, 4),
    "resnext152_32x8d": ("bottleneck", (3, 8, 36, 3), 32, 8),
    "resnext152_64x4d": ("bottleneck", (3, 8, 36, 3), 64, 4),
}


def resnet(name: str, *, width: float = 1.0, in_channels: int = 3, small_stem: bool = False) -> nn.Module:
    """A trunk of `ARCHITECTURES` without classifier: images (N, in_channels, H, W) -> features (N, `feature_dim`).

    `width` multiplies every channel count. The small stem, for pictures of about 32 pixels, is a 3x3 convolution of
    stride 1 without max-pooling instead of 7x7/2 and a pool.
    """
    block, depths, groups, group_width = ARCHITECTURES[name]
    block_type = BasicBlock if block == "basic" else Bottleneck
    return ResNet(block_type, depths, groups, group_width, width, in_channels, small_stem)


def _conv(dim_in: int, dim_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _shortcut(dim_in: int, dim_out: int, stride: int) -> nn.Module:
    if stride == 1 and dim_in == dim_out:
        return nn.Identity()
    return nn.Sequential(_conv(dim_in, dim_out, 1, stride), nn.BatchNorm2d(dim_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; `planes` output channels, `inner` between them."""

    expansion = 1

    def __init__(self, dim_in: int, planes: int, inner: int, stride: int, groups: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(dim_in, inner, 3, stride, groups), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, planes, 3, 1, groups), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(dim_in, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)).add_(self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 (which carries the stride), 1x1 around a shortcut; 4 * `planes` output channels."""

    expansion = 4

    def __init__(self, dim_in: int, planes: int, inner: int, stride: int, groups: int):
        super().__init__()
        dim_out = planes * self.expansion
        self.conv1, self.bn1 = _conv(dim_in, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, dim_out, 1), nn.BatchNorm2d(dim_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(dim_in, dim_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)).add_(self.downsample(x)))


class ResNet(Layered):
    """Stem, four stages, global average pool; `feature_dim` channels come out. Made by `resnet`."""

    sides = {"stem": 8, "layer1": 6, "layer2": 4, "layer3": 3, "layer4": None, "pool": None}
    shrink = staticmethod(F.adaptive_avg_pool2d)

    def __init__(
        self,
        block: type[nn.Module],
        depths: tuple[int, ...],
        groups: int,
        group_width: int,
        width: float,
        in_channels: int,
        small_stem: bool,
    ):
        super().__init__()
        if int(int(64 * width) * group_width / 64) < 1:
            raise ValueError(f"a width of {width:g} leaves this architecture without channels; raise --width.")
        dim = max(int(64 * width), 64)  # a trunk of half width keeps the full stem, as in CMC
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1, self.bn1 = _conv(in_channels, dim, kernel, stride), nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        for stage, depth in enumerate(depths):
            planes = int(64 * width) * 2**stage
            inner = int(planes * group_width / 64) * groups
            blocks = []
            for index in range(depth):
                blocks.append(block(dim, planes, inner, 2 if stage > 0 and index == 0 else 1, groups))
                dim = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = dim
        self.apply(_initialise)

    def stem(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def pool(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
