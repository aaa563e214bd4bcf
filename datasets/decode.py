"""Image files of any kind as upright RGB pictures."""

from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

try:  # the same bits as Pillow's a fifth faster, as long as torchvision has it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

ImageFile.LOAD_TRUNCATED_IMAGES = True  # a picture cut short is used as far as it goes, instead of ending a long run

_SIXTEEN_BITS = 65535
_JPEG = b"\xff\xd8\xff"


class Unreadable(ValueError):
    """An image that cannot be decoded, and nothing may stand in for it."""


def read_image(path: str) -> Tensor:
    """Decode a file: turned as its EXIF data say, transparent parts over white, 16-bit grey scaled to 8 bits.

    Returns RGB, uint8 (3, H, W), in memory pixel by pixel. Raises ValueError for what cannot be decoded: no image,
    floating-point or 32-bit pixels, an unknown number of channels, more than the 179 million pixels Pillow takes to be
    an attack.
    """
    try:
        return _jpeg(path)
    except (OSError, RuntimeError, Image.DecompressionBombError):
        return read_by_pillow(path)


def read_by_pillow(path: str) -> Tensor:
    """What `read_image` returns, to the bit, by Pillow alone."""
    return torch.from_numpy(np.array(_read_any(path))).permute(2, 0, 1)


def _jpeg(path: str) -> Tensor:
    """By torchvision. An error of some kind for what is left to Pillow, which looks at the size in the header first."""
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if decode_jpeg is None or not content.startswith(_JPEG):
        raise RuntimeError
    if Image.open(BytesIO(content)).mode not in ("L", "RGB"):
        raise RuntimeError
    coded = torch.frombuffer(content, dtype=torch.uint8)
    return decode_jpeg(coded, ImageReadMode.UNCHANGED, apply_exif_orientation=True).expand(3, -1, -1)


def _read_any(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            with suppress(Exception):  # damaged EXIF data say nothing about the picture
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # decoders raise almost anything over damaged files
        raise ValueError(f"{path} cannot be read as an image ({why(error)}); convert, repair or remove it.") from error


def why(error: BaseException) -> str:
    """What a decoder says in any number of lines, none at all included, in one."""
    return " ".join(str(error).split()) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, in either byte order; Pillow holds some of it as 32-bit numbers (mode I)."""
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > _SIXTEEN_BITS:
        raise ValueError("its pixels are outside of the 16-bit range of 0 to 65535")
    return Image.fromarray(np.rint(grey * (255 / _SIXTEEN_BITS)).astype(np.uint8))
