"""A recipe's views image by image, by Pillow and torchvision: slower, the same draws, and what `recipes` is held to.

Only RandAugment and colour spaces have no other way than there.
"""

import math
from dataclasses import replace

import torch
import torchvision.transforms.functional as F
from torch import Tensor

from datasets.photometric import REACH
from datasets.recipes import JITTER, Centre, Jigsaw, Look, Recipe, Style, View

_ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def one_by_one(recipe: Recipe) -> Recipe:
    """The recipe with every view made image by image.

    Colours agree to 1e-4 (hue; the rest 1e-5), crops of decoded files to one grey level, those in memory to 1e-5.
    """
    return replace(recipe, looks=tuple(map(_slow, recipe.looks)))


def _slow(look: Look) -> Look:
    if isinstance(look, Jigsaw):
        return Jigsaw(_slow(look.frame))
    if isinstance(look, Centre):
        return _Centre(**vars(look))
    return _View(**vars(look) | {"style": _Style(**vars(look.style))})


class _Style(Style):
    def apply(self, images: Tensor, keys: Tensor, view: str) -> Tensor:
        drawn = {name: values.tolist() for name, values in self.parameters(keys, view).items()}
        for image, values in zip(images, zip(*drawn.values())):
            image.copy_(_coloured(image, **dict(zip(drawn, values))))
        return images


def _coloured(image: Tensor, *, order: list[int], gray: bool, sigma: float, solarize: bool, **factors: float) -> Tensor:
    """float 0..1 (3, H, W) with the parameters of `Style.parameters` for one sample."""
    for number in order:
        image = _ADJUST[number](image, factors[JITTER[number]]) if number >= 0 else image
    image = F.rgb_to_grayscale(image, 3) if gray else image
    if sigma:
        reach = min(math.ceil(REACH * sigma), min(image.shape[1:]) - 1)
        image = F.gaussian_blur(image, [2 * reach + 1] * 2, sigma)
    return F.solarize(image, 0.5) if solarize else image


class _View(View):
    def _cropped(self, image: Tensor, box: list[int]) -> Tensor:
        return F.pil_to_tensor(F.resized_crop(F.to_pil_image(image), *box, [self.size, self.size]))

    def _cropped_batch(self, images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
        crops = [
            F.resized_crop(image, *box, [self.size, self.size], antialias=True)
            for image, box in zip(images, boxes.tolist())
        ]
        return torch.stack([F.hflip(crop) if mirrored else crop for crop, mirrored in zip(crops, flip.tolist())])


class _Centre(Centre):
    def _scaled(self, image: Tensor) -> Tensor:
        return F.pil_to_tensor(F.resize(F.to_pil_image(image), self._sides(*image.shape[1:])))
