"""Image files of any kind as upright RGB pictures."""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageFile, ImageOps

ImageFile.LOAD_TRUNCATED_IMAGES = True  # a picture cut short is used as far as it goes, instead of ending a long run

_SIXTEEN_BITS = 65535


def read_image(path: str) -> Image.Image:
    """Decode a file: turned as its EXIF data say, transparent parts over white, 16-bit grey scaled to 8 bits.

    Returns an RGB image. Raises ValueError for what cannot be decoded: no image, floating-point or 32-bit pixels, an
    unknown number of channels, more than the 179 million pixels Pillow takes to be an attack.
    """
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
