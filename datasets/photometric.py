"""Colour for whole batches, with parameters of its own for every sample.

Images are float (N, 3, H, W) in 0..1, and every function equals its namesake in torchvision.transforms.functional on
tensors, sample by sample. Which samples an operation touches is decided by tensors on the host, so that working on a
GPU never waits for it.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

LUMA = (0.2989, 0.587, 0.114)
REACH = 40**0.5  # of a blur, in standard deviations


def color_jitter(
    images: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, order: Tensor
) -> Tensor:
    """Change brightness, contrast, saturation and hue, in an order of its own for every sample. Works in place.

    images (N, 3, H, W); factors (N,) (hue in [-.5, .5] turns of the colour circle); order (N, 4) on the CPU: a row is a
    permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue, or all -1 to leave the sample as it is.
    """
    factors = [factor.to(images.device, non_blocking=True) for factor in (brightness, contrast, saturation, hue)]
    for slot in order.unbind(1):
        for number, (adjust, factor) in enumerate(zip(OPERATIONS, factors)):
            rows = _rows(slot == number, images.device)
            if not len(rows):
                continue
            images.index_copy_(0, rows, adjust(images.index_select(0, rows), factor.index_select(0, rows)))
    return images


def grayscale(images: Tensor, mask: Tensor) -> Tensor:
    """Replace the images chosen by mask (N,) bool on the CPU by their luma in all three channels. Works in place."""
    rows = _rows(mask, images.device)
    if not len(rows):
        return images
    return images.index_copy_(0, rows, luma(images.index_select(0, rows)).expand(-1, 3, -1, -1))


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, reflected borders; sigma (N,) in pixels on the CPU, 0 leaves an image as it is. Works in place.

    The Gaussian reaches as far as it exceeds e^-20 of its peak (6.3 sigma), and less than a side.
    """
    rows = _rows(sigma > 0, images.device)
    if not len(rows):
        return images
    height, width = images.shape[2:]
    widest = max(2.0, sigma.max().item())  # 2 is that of all recipes: equally many taps whatever else is in the batch
    reach = min(math.ceil(REACH * widest), height - 1, width - 1)
    exponent = torch.arange(-reach, reach + 1) ** 2 / (2 * sigma[sigma > 0].unsqueeze(1) ** 2)
    taps = (-exponent).exp().masked_fill(exponent > REACH**2 / 2, 0)
    taps = (taps / taps.sum(1, keepdim=True)).to(images.device, non_blocking=True).repeat_interleave(3, 0)
    planes = pad(images.index_select(0, rows).view(1, len(taps), height, width), 4 * [reach], mode="reflect")
    for kernel in (taps.view(-1, 1, 1, 2 * reach + 1), taps.view(-1, 1, 2 * reach + 1, 1)):
        planes = conv2d(planes, kernel, groups=len(taps))
    return images.index_copy_(0, rows, planes.view(-1, 3, height, width))


def solarize(images: Tensor, mask: Tensor) -> Tensor:
    """Invert what is .5 or brighter in the images chosen by mask (N,) bool on the CPU. Works in place."""
    rows = _rows(mask, images.device)
    if not len(rows):
        return images
    chosen = images.index_select(0, rows)
    return images.index_copy_(0, rows, torch.where(chosen < 0.5, chosen, 1 - chosen))


def luma(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _column(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    factor = _column(factor)
    return (images * factor).add_((1 - factor) * luma(images).mean((1, 2, 3), keepdim=True)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    factor = _column(factor)
    return (images * factor).add_(luma(images).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue of HSV by `factor` of a circle; value and chroma stay.

    A channel is value - chroma * wave(sixths of a turn), the same clipped triangle wave for red, green and blue, each a
    third of a turn further: no conversion to HSV and back.
    """
    sixths, chroma, value = hue_chroma_value(images)
    offset = torch.tensor([5 / 6, 3 / 6, 1 / 6]).view(1, 3, 1, 1).to(images.device, non_blocking=True)
    turns = sixths.div_(6).add_(factor.view(-1, 1, 1)).unsqueeze(1) + offset
    wave = turns.sub_(turns.floor()).mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return value.unsqueeze(1) - wave.mul_(chroma.unsqueeze(1))


def hue_chroma_value(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3, H, W) -> three of (N, H, W): hue in sixths of the colour circle from -1 to 5, chroma and value in 0..1."""
    red, green, blue = images.unbind(1)
    value = red.maximum(green).maximum(blue)
    chroma = value - red.minimum(green).minimum(blue)
    sixths = torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4))
    sixths = torch.where(value == red, green - blue, sixths).div_(chroma.clamp(min=1e-8))  # grey: 0 / 1e-8
    return sixths, chroma, value


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # as numbered by `order`


def _column(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def _rows(mask: Tensor, device: torch.device) -> Tensor:
    return mask.nonzero().squeeze(1).to(device, non_blocking=True)
