"""Geometry for whole batches, with parameters of its own for every sample.

Cropping, resizing and flipping are linear and separable: each is a matrix acting on the rows of an image and one acting
on its columns. `separable` applies them; the other functions build them.
"""

import math

import torch
from torch import Tensor

ATTEMPTS = 10


def random_resized_crop_boxes(
    u: Tensor,
    height: int | Tensor,
    width: int | Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes distributed as those of torchvision's RandomResizedCrop, of images of `height` and `width`, or (N,) each.

    u (N, 2 * ATTEMPTS + 2) uniform in [0, 1). Each attempt proposes an area (uniform in `scale`, as a fraction of the
    image) and an aspect ratio (log-uniform in `ratio`); the first box that fits is placed uniformly. If none fits, it
    is the largest central box with an allowed ratio. Returns (N, 4) int64: top, left, height, width.
    """
    u = u.double()
    height, width = (torch.as_tensor(side).view(-1, 1) for side in (height, width))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * u[:, ATTEMPTS:-2]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h = w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)
    height, width = height.squeeze(1), width.squeeze(1)
    box = torch.stack([u[:, -2] * (height - h + 1), u[:, -1] * (width - w + 1), h, w], dim=1).long()
    return torch.where(fits.any(1, keepdim=True), box, _central_boxes(height, width, ratio))


def _central_boxes(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> Tensor:
    h = torch.minimum(height, (width.double() / ratio[0]).round().long())
    w = torch.minimum(width, (height.double() * ratio[1]).round().long())
    return torch.stack([(height - h) // 2, (width - w) // 2, h, w], dim=1)


def crop_matrices(boxes: Tensor, flip: Tensor, height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Crop, resize to size x size (bilinear, antialiased, as Pillow's crop followed by resize) and flip.

    boxes (N, 4): top, left, height, width; flip (N,) bool: mirror left and right; height, width: of the images.
    Returns rows (N, size, height) and cols (N, size, width) for `separable`.
    """
    top, left, h, w = boxes.unbind(1)
    cols = _resize_matrix(left, w, width, size)
    cols = torch.where(flip.view(-1, 1, 1), cols.flip(1), cols)
    return _resize_matrix(top, h, height, size), cols


def _resize_matrix(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """(N, size_out, size_in): triangle filters as wide as an output pixel (but never narrower than an input pixel).

    Pixels outside [start, start + length) get no weight, so nothing outside the crop leaks in.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    place = torch.arange(size_in, device=start.device)
    step = length / size_out
    centre = start + (torch.arange(size_out, device=start.device).view(1, -1, 1) + 0.5) * step
    weight = (1 - (place + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((place >= start) & (place < start + length))
    return weight / weight.sum(2, keepdim=True)


def separable(images: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Apply `rows` (N, h, H) from the left and `cols` (N, w, W) from the right to images (N, C, H, W) float.

    Returns (N, C, h, w).
    """
    n, c, height, width = images.shape
    half = torch.bmm(rows, images.transpose(1, 2).reshape(n, height, c * width))
    full = torch.bmm(half.view(n, -1, width), cols.transpose(1, 2))
    return full.view(n, -1, c, cols.shape[1]).transpose(1, 2)
