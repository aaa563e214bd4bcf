"""Recipes: how an image becomes the named views that training or an evaluation sees.

A recipe has a geometric part, `crop` (one Pillow image, in a loader worker) or `crop_batch` (a set held in memory,
where the images are), and a part for whole batches on the device, `finish`. Every number a view needs is drawn from
the sample's key and the view's name; `parameters` returns them, so a preview shows exactly what training sees.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandAugment

from datasets import augment, photometric
from datasets.keyed import hash64, uniform
from datasets.sources import SMALL

Triple = tuple[float, float, float]
PAIR = ("query", "key")


class Views(Protocol):
    """What the loaders ask of a recipe."""

    name: str
    input_res: int
    views: tuple[str, ...]

    def crop(self, image: Image.Image, key: int) -> dict[str, Tensor]:
        """RGB image -> {view: uint8 (3, input_res, input_res)}."""

    def crop_batch(self, images: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, H, W) on any device, keys (N,) on the CPU -> {view: float 0..1 (N, 3, input_res, input_res)}."""

    def finish(self, views: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """Cropped views, uint8 or float 0..1 -> normalised float views of the same shape and device."""


@dataclass(frozen=True)
class Recipe:
    """Random resized crop and flip, then colour jitter, grey and blur, each with its probability.

    The blur is a true Gaussian of the drawn sigma; Pillow's GaussianBlur, which the published recipes call with the
    same sigma, approximates it by repeated box filters. Colour is computed in floating point, without rounding in
    between.
    """

    name: str
    input_res: int
    views: tuple[str, ...]
    crop_scale: tuple[float, float]
    mean: Triple
    std: Triple
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5
    randaugment: bool = False

    def parameters(self, keys: Tensor, view: str) -> dict[str, Tensor]:
        """Every number drawn for `view` of the samples `keys` (N,).

        crop (N, 22) uniform numbers for the box, flip (N,) bool; brightness, contrast, saturation, hue (N,) factors;
        order (N, 4), -1 where the jitter is left out; gray (N,) bool; sigma (N,) pixels, 0 where the blur is left out.
        """

        def draw(name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * uniform(keys, 1, f"{view}/{name}").squeeze(1)

        brightness, contrast, saturation, hue = self.jitter
        order = uniform(keys, 4, f"{view}/order").argsort(dim=1, stable=True)
        order[draw("jitter") >= self.jitter_p] = -1
        sigma = draw("sigma", *self.blur_sigma)
        return self._geometry(keys, view) | {
            "brightness": draw("brightness", max(0.0, 1 - brightness), 1 + brightness),
            "contrast": draw("contrast", max(0.0, 1 - contrast), 1 + contrast),
            "saturation": draw("saturation", max(0.0, 1 - saturation), 1 + saturation),
            "hue": draw("hue", -hue, hue),
            "order": order,
            "gray": draw("gray") < self.gray_p,
            "sigma": torch.where(draw("blur") < self.blur_p, sigma, 0.0),
        }

    def crop(self, image: Image.Image, key: int) -> dict[str, Tensor]:
        return {view: _to_tensor(self._crop(image, key, view)) for view in self.views}

    def crop_batch(self, images: Tensor, keys: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[2:]
        images, cropped = images.float().div_(255), {}
        for view in self.views:
            drawn = self._geometry(keys, view)
            boxes = augment.random_resized_crop_boxes(drawn["crop"], height, width, self.crop_scale)
            boxes, flip = (x.to(images.device, non_blocking=True) for x in (boxes, drawn["flip"]))
            matrices = augment.crop_matrices(boxes, flip, height, width, self.input_res)
            cropped[view] = self._randaugmented(augment.separable(images, *matrices), keys, view)
        return cropped

    def finish(self, views: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        return {view: self._finish(images, self.parameters(keys, view)) for view, images in views.items()}

    def _geometry(self, keys: Tensor, view: str) -> dict[str, Tensor]:
        return {
            "crop": uniform(keys, 2 * augment.ATTEMPTS + 2, f"{view}/crop"),
            "flip": uniform(keys, 1, f"{view}/flip").squeeze(1) < self.flip_p,
        }

    def _crop(self, image: Image.Image, key: int, view: str) -> Image.Image:
        keys = torch.tensor([key])
        drawn = self._geometry(keys, view)
        boxes = augment.random_resized_crop_boxes(drawn["crop"], image.height, image.width, self.crop_scale)
        top, left, height, width = boxes[0].tolist()
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.input_res, self.input_res), Image.Resampling.BILINEAR)
        if drawn["flip"].item():
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _randaugment(image, keys, view) if self.randaugment else image

    def _randaugmented(self, images: Tensor, keys: Tensor, view: str) -> Tensor:
        """The batch through Pillow, image by image: slow, and on a GPU a trip to the host."""
        if not self.randaugment:
            return images
        pictures = images.mul(255).round_().byte().permute(0, 2, 3, 1).cpu().numpy()
        changed = [_randaugment(Image.fromarray(p), k, view) for p, k in zip(pictures, keys.split(1))]
        return torch.stack([_to_tensor(p) for p in changed]).to(images.device).float().div_(255)

    def _finish(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        images = _to_float(images)
        factors = {name: drawn[name] for name in ("brightness", "contrast", "saturation", "hue", "order")}
        images = photometric.color_jitter(images, **factors)
        images = photometric.grayscale(images, drawn["gray"])
        images = photometric.blur(images, drawn["sigma"])
        return _normalise(images, self.mean, self.std)


@dataclass(frozen=True)
class Evaluation:
    """The test view: shorter side to 256/224 of the resolution, centre crop. Small images are only brought to size."""

    name: str
    input_res: int
    mean: Triple
    std: Triple
    views: tuple[str, ...] = ("image",)

    @property
    def side(self) -> int:
        return self.input_res * 256 // 224 if self.input_res > SMALL else self.input_res

    def crop(self, image: Image.Image, key: int) -> dict[str, Tensor]:
        image = F.resize(image, self.side)
        return {"image": _to_tensor(F.center_crop(image, self.input_res))}

    def crop_batch(self, images: Tensor, keys: Tensor) -> dict[str, Tensor]:
        images = images.float().div_(255)
        if min(images.shape[2:]) != self.side:
            images = F.resize(images, self.side, antialias=True)
        return {"image": F.center_crop(images, self.input_res)}

    def finish(self, views: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        return {view: _normalise(_to_float(images), self.mean, self.std) for view, images in views.items()}


def mocov1(input_res: int, crop_scale: tuple[float, float], mean: Triple, std: Triple) -> Recipe:
    """MoCo (He et al., CVPR 2020), in the order of PyContrast: colour jitter always, then grey."""
    colour = {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": 1.0, "gray_p": 0.2}
    return Recipe("mocov1", input_res, PAIR, crop_scale, mean, std, **colour)


def mocov2(input_res: int, crop_scale: tuple[float, float], mean: Triple, std: Triple) -> Recipe:
    """MoCo v2 (Chen et al., arXiv 2003.04297): jitter, grey, blur (no blur for small images)."""
    colour = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2}
    return Recipe("mocov2", input_res, PAIR, crop_scale, mean, std, **colour, blur_p=0.5 if input_res > SMALL else 0.0)


def simclr(input_res: int, crop_scale: tuple[float, float], mean: Triple, std: Triple) -> Recipe:
    """SimCLR (Chen et al., ICML 2020, appendix A): strong jitter, grey, blur; for small images (appendix B.9) half
    the strength and no blur.
    """
    small = input_res <= SMALL
    strength = 0.5 if small else 1.0
    jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    colour = {"jitter": jitter, "jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.0 if small else 0.5}
    return Recipe("simclr", input_res, PAIR, crop_scale, mean, std, **colour)


RECIPES = {"mocov1": mocov1, "mocov2": mocov2, "simclr": simclr}


def probe(
    input_res: int, crop_scale: tuple[float, float], mean: Triple, std: Triple, *, randaugment: bool = False
) -> Recipe:
    """Training view "image" of the linear probe: random resized crop and flip, on request RandAugment."""
    return Recipe("probe", input_res, ("image",), crop_scale, mean, std, randaugment=randaugment)


def evaluation(input_res: int, mean: Triple, std: Triple) -> Evaluation:
    """Test view "image" of the evaluations."""
    return Evaluation("evaluation", input_res, mean, std)


def _randaugment(image: Image.Image, keys: Tensor, view: str) -> Image.Image:
    """RandAugment (Cubuk et al., 2020), two operations of magnitude 10.

    torchvision's draws from the global generator, so that one is seeded for the call and put back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(hash64(keys, f"{view}/randaugment")))
        return RandAugment(num_ops=2, magnitude=10, num_magnitude_bins=11)(image)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _to_float(images: Tensor) -> Tensor:
    """A contiguous float copy in 0..1 that may be changed in place."""
    copy = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copy if images.is_floating_point() else copy.div_(255)


def _normalise(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    mean, std = (torch.tensor(x).view(1, 3, 1, 1).to(images.device, non_blocking=True) for x in (mean, std))
    return images.sub_(mean).div_(std)
