"""Colour spaces: what an encoder sees of RGB images.

Every conversion equals its namesake in scikit-image (rgb2lab and so on), here on batches, in float32, on any device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from datasets.photometric import hue_chroma_value

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Colours:
    """A colour space and what its channels are normalised by."""

    space: str
    mean: Triple
    std: Triple

    def __call__(self, images: Tensor) -> Tensor:
        """RGB float 0..1 (N, 3, H, W), which may be overwritten -> normalised channels of the space, same shape."""
        images = _CONVERSIONS[self.space](images)
        mean, std = (_column(x, images) for x in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def shown(self, images: Tensor) -> Tensor:
        """Normalised channels (..., 3, H, W) -> RGB in 0..1 to look at: what they were made of; but of another space
        (..., 3, H, 2 W), the first channel in grey and beside it the other two as red and blue.
        """
        if self.space == "RGB":
            return images * _column(self.std, images) + _column(self.mean, images)
        first, second, third = (images / 2 + 0.5).clamp(0, 1).split(1, dim=-3)  # their range is about -1 to 1
        grey, pair = torch.cat([first, first, first], -3), torch.cat([second, torch.full_like(first, 0.5), third], -3)
        return torch.cat([grey, pair], -1)


def colours(modal: str, view: str, mean: Triple, std: Triple) -> Colours:
    """What --modal and --view ask for.

    modal RGB: the channels as they are, normalised by `mean` and `std` (of 0..1). modal CMC: the space `view`, whose
    first channel is one modality and whose other two are the other (Contrastive Multiview Coding, ECCV 2020),
    normalised by constants of its own.
    """
    return Colours("RGB", mean, std) if modal == "RGB" else Colours(view, *_NORMALISATION[view])


def _column(x: Triple, images: Tensor) -> Tensor:
    return torch.tensor(x, dtype=torch.float32).view(1, 3, 1, 1).to(images.device, non_blocking=True)


def _affine(images: Tensor, matrix: tuple[Triple, Triple, Triple], offset: Triple = (0, 0, 0)) -> Tensor:
    """matrix @ colour + offset for every pixel, as sums of whole planes: no matrix product that a GPU would round."""
    red, green, blue = images.unbind(1)
    rows = [(red * r).add_(green, alpha=g).add_(blue, alpha=b).add_(o) for (r, g, b), o in zip(matrix, offset)]
    return torch.stack(rows, dim=1)


_WHITE = (0.95047, 1.0, 1.08883)  # D65 in XYZ
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))  # linear RGB
_STAINS = (  # the inverse of the colours of three stains (Ruifrok & Johnston, 2001)
    (1.87798274, -0.06590806, -0.60190736),
    (-1.00767869, 1.13473037, -0.48041419),
    (-0.55611582, -0.1355218, 1.57358807),
)


def _xyz(images: Tensor) -> Tensor:
    """The standard's curve undone, then the primaries of sRGB."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    return _affine(linear, _XYZ)


def _root(share: Tensor) -> Tensor:
    """CIE's response to a share of white: the cube root, but a straight line near black."""
    return torch.where(share > 0.008856, share.clamp(min=0.008856) ** (1 / 3), 7.787 * share + 16 / 116)


def _lab(images: Tensor) -> Tensor:
    x, y, z = _root(_xyz(images).div_(_column(_WHITE, images))).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _luv(images: Tensor) -> Tensor:
    x, y, z = _xyz(images).unbind(1)
    lightness, total = 116 * _root(y) - 16, (x + 15 * y + 3 * z).clamp(min=1e-12)
    white = _WHITE[0] + 15 * _WHITE[1] + 3 * _WHITE[2]
    u, v = 4 * x / total - 4 * _WHITE[0] / white, 9 * y / total - 9 * _WHITE[1] / white
    return torch.stack([lightness, 13 * lightness * u, 13 * lightness * v], dim=1)


def _hsv(images: Tensor) -> Tensor:
    sixths, chroma, value = hue_chroma_value(images)
    return torch.stack([(sixths / 6).remainder(1), chroma / value.clamp(min=1e-8), value], dim=1)


def _hed(images: Tensor) -> Tensor:
    """Haematoxylin, eosin and DAB: the log of a colour, none below 1e-6, parted into the three stains."""
    return _affine(images.clamp(min=1e-6).log() / math.log(1e-6), _STAINS).clamp_(min=0)


_LUMA, _NONE = (0.299, 0.587, 0.114), (0, 0, 0)

# Matrices and offsets. CIERGB takes RGB as it is, not linear RGB.
_AFFINE: dict[str, tuple[tuple[Triple, Triple, Triple], Triple]] = {
    "YCbCr": (((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214)), (16, 128, 128)),
    "YDbDr": ((_LUMA, (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217)), _NONE),
    "YPbPr": ((_LUMA, (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)), _NONE),
    "YIQ": ((_LUMA, (0.59590059, -0.27455667, -0.32134392), (0.21153661, -0.52273617, 0.31119955)), _NONE),
    "YUV": ((_LUMA, (-0.14714119, -0.28886916, 0.43601035), (0.61497538, -0.51496512, -0.10001026)), _NONE),
    "CIERGB": (
        (
            (0.13725336, 0.02629378, -0.01466154),
            (0.01638562, 0.1498009, 0.01669446),
            (0.00329059, 0.01979351, 0.16969164),
        ),
        _NONE,
    ),
}

_CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "RGB": lambda images: images,
    "Lab": _lab,
    "Luv": _luv,
    "XYZ": _xyz,
    "HSV": _hsv,
    "HED": _hed,
} | {space: partial(_affine, matrix=matrix, offset=offset) for space, (matrix, offset) in _AFFINE.items()}

# Mean and scale. Lab, YCbCr (in 0..255) and YDbDr as published with CMC and PyContrast: the last two are centred at the
# means of photographs. All others, and in effect Lab too: middle and half of the range that 8-bit RGB covers, found by
# converting the faces of the RGB cube.
_NORMALISATION: dict[str, tuple[Triple, Triple]] = {
    "Lab": ((50, 6.025, -6.6895), (50, 92.208, 101.1675)),
    "Luv": ((50, 45.968, -13.349), (50, 129.046, 120.748)),
    "YCbCr": ((116.151, 121.080, 132.342), (109.5, 111.855, 111.964)),
    "YDbDr": ((0.457, -0.082, -0.052), (0.5, 1.331, 1.333)),
    "YPbPr": ((0.5, 0, 0), (0.5, 0.5, 0.5)),
    "YIQ": ((0.5, 0, 0), (0.5, 0.5959, 0.52274)),
    "YUV": ((0.5, 0, 0), (0.5, 0.43601, 0.61498)),
    "XYZ": ((0.47523, 0.5, 0.54438), (0.47523, 0.5, 0.54438)),
    "CIERGB": ((0.074443, 0.091440, 0.096388), (0.089104, 0.091440, 0.096388)),
    "HSV": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "HED": ((0.93899, 0.56737, 0.78679), (0.93899, 0.56737, 0.78679)),
}
