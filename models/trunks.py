"""Trunks by name, in every spelling in use."""

from functools import partial

from models.alexnet import AlexNet
from models.layered import Layered
from models.resnet import ARCHITECTURES, ResNet, resnet

_TRUNKS = {name: partial(resnet, name) for name in ARCHITECTURES} | {"alexnet": AlexNet}
_PUBLISHED_NAMES = {
    "resnext50": "resnext50_32x4d",
    "resnext101v1": "resnext101_32x4d",
    "resnext101v2": "resnext101_32x8d",
    "resnext101v3": "resnext101_64x4d",
    "resnext152v1": "resnext152_32x4d",
    "resnext152v2": "resnext152_32x8d",
    "resnext152v3": "resnext152_64x4d",
}
_FACTORS = {"": 1, "x2": 2, "x4": 4, "v1": 1, "v2": 2, "v3": 4}  # PyContrast's and CMC's ways to say the same


def trunk(arch: str, *, width: float = 1.0, in_channels: int = 3, small_stem: bool = False) -> Layered:
    """Images (N, in_channels, H, W) -> features (N, `feature_dim`).

    `width`, times what the end of `arch` asks for, multiplies every channel count. ValueError when `arch` is unknown.
    """
    name, factor = split_factor(arch)
    return _TRUNKS[name](width=width * factor, in_channels=in_channels, small_stem=small_stem)


def layers(arch: str) -> tuple[str, ...]:
    """The names of the layers of a trunk, from the first to the last."""
    return tuple((AlexNet if split_factor(arch)[0] == "alexnet" else ResNet).sides)


def split_factor(arch: str) -> tuple[str, int]:
    """ "resnext50x2" -> ("resnext50_32x4d", 2): the plain name, and the width its end asks for."""
    for suffix, factor in _FACTORS.items():
        name = arch.removesuffix(suffix)
        name = _PUBLISHED_NAMES.get(name, name)
        if arch.endswith(suffix) and name in _TRUNKS:
            return name, factor
    known = ", ".join((*_TRUNKS, *_PUBLISHED_NAMES))
    raise ValueError(f"unknown architecture {arch!r}; choose one of {known}, with x2 or x4 appended for a wider one.")
