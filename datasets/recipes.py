"""Recipes: how an image becomes the named views that training or an evaluation sees.

A recipe has a look for every view. A look has a geometric part, `crop` (images of any sizes, in a loader worker) or
`crop_batch` (a set held in memory, where the images are), and a part for whole batches on the device, `finish`. Every
number a look needs is drawn from the sample's key and the view's name. `told` says in plain numbers what came of them,
so a preview shows exactly what training sees and why.
"""

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from datasets import augment, photometric
from datasets.colours import Colours
from datasets.keyed import hash64, uniform
from datasets.sources import SMALL

IMAGENET_GREY = (124, 116, 104)
BLUR_SIGMA = (0.1, 2.0)
GRID = 3  # a jigsaw has GRID x GRID pieces
JITTER = ("brightness", "contrast", "saturation", "hue")  # as numbered by `order`

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
GENTLE = ("AutoContrast", "Identity", "Sharpness", *GEOMETRIC)  # for colour spaces
ALL = (
    *("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", *GEOMETRIC),
)


class Look(Protocol):
    """What a recipe asks of whatever makes one view."""

    name: str

    def crop(self, images: Sequence[Tensor], keys: Tensor) -> Sequence[Tensor]:
        """RGB images, uint8 (3, H, W), keys (N,) -> uint8 (3, size, size) each, or (pieces, 3, size, size)."""

    def crop_batch(self, images: Tensor, keys: Tensor) -> Tensor:
        """float 0..1 (N, 3, H, W) on any device, keys (N,) on the CPU -> float 0..1 (N, ...), each as `crop` has it."""

    def finish(self, images: Tensor, keys: Tensor, colours: Colours) -> Tensor:
        """Cropped images, uint8 or float 0..1 -> new normalised float ones of the same shape and device."""

    def told(self, key: int, height: int, width: int) -> dict[str, Any]:
        """What becomes of a picture of that size, step by step, ready for json.dump."""


@dataclass(frozen=True)
class Style:
    """Colour jitter, grey, blur and solarisation, in this order and each with its probability.

    The blur is a true Gaussian of the drawn sigma; Pillow's GaussianBlur, which the published recipes call with the
    same sigma, approximates it by repeated box filters. Colour is computed in floating point, without rounding in
    between. `randaugment` names the operations of timm's RandAugment, none to leave it out. It needs 8 bits, so it
    comes first, straight after the crop; published recipes have it between blur and grey.
    """

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    solarize_p: float = 0.0
    randaugment: tuple[str, ...] = ()
    small_jitter: float = 1.0  # factor on the jitter of small pictures

    def parameters(self, keys: Tensor, view: str) -> dict[str, Tensor]:
        """brightness, contrast, saturation, hue (N,) factors; order (N, 4), -1 where the jitter is left out; gray (N,)
        bool; sigma (N,) pixels, 0 where the blur is left out; solarize (N,) bool.
        """

        def draw(name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * uniform(keys, 1, f"{view}/{name}").squeeze(1)

        brightness, contrast, saturation, hue = self.jitter
        order = uniform(keys, 4, f"{view}/order").argsort(dim=1, stable=True)
        order[draw("jitter") >= self.jitter_p] = -1
        return {
            "brightness": draw("brightness", max(0.0, 1 - brightness), 1 + brightness),
            "contrast": draw("contrast", max(0.0, 1 - contrast), 1 + contrast),
            "saturation": draw("saturation", max(0.0, 1 - saturation), 1 + saturation),
            "hue": draw("hue", -hue, hue),
            "order": order,
            "gray": draw("gray") < self.gray_p,
            "sigma": torch.where(draw("blur") < self.blur_p, draw("sigma", *BLUR_SIGMA), 0.0),
            "solarize": draw("solarize") < self.solarize_p,
        }

    def apply(self, images: Tensor, keys: Tensor, view: str) -> Tensor:
        """float 0..1 (N, 3, H, W) -> the same, changed in place."""
        drawn = self.parameters(keys, view)
        images = photometric.color_jitter(images, **{name: drawn[name] for name in (*JITTER, "order")})
        images = photometric.grayscale(images, drawn["gray"])
        images = photometric.blur(images, drawn["sigma"])
        return photometric.solarize(images, drawn["solarize"])

    def told(self, keys: Tensor, view: str) -> list[dict[str, Any]]:
        """What `apply` does to each sample: jitter (name -> factor, in their order), gray, blur (sigma in pixels),
        solarize, as far as it does them.
        """
        drawn = {name: values.tolist() for name, values in self.parameters(keys, view).items()}
        told = []
        for i, order in enumerate(drawn["order"]):
            jitter = {JITTER[number]: drawn[JITTER[number]][i] for number in order if number >= 0}
            rest = {"gray": drawn["gray"][i], "blur": drawn["sigma"][i], "solarize": drawn["solarize"][i]}
            told.append({name: done for name, done in ({"jitter": jitter} | rest).items() if done})
        return told


@dataclass(frozen=True)
class View:
    """A random resized crop, flipped half of the time, in a style. `crop_scale` is the share of the picture."""

    name: str
    size: int
    crop_scale: tuple[float, float]
    style: Style = Style()

    def parameters(self, keys: Tensor) -> dict[str, Tensor]:
        """Every number drawn for the samples `keys` (N,).

        crop (N, 22) uniform numbers for the box, flip (N,) bool, and those of the style.
        """
        return self._geometry(keys) | self.style.parameters(keys, self.name)

    def crop(self, images: Sequence[Tensor], keys: Tensor) -> Sequence[Tensor]:
        height, width = torch.tensor([image.shape[1:] for image in images]).unbind(1)
        boxes, flip = (x.tolist() for x in self._boxes(keys, height, width))
        crops = [self._cropped(image, box) for image, box in zip(images, boxes)]
        crops = [crop.flip(2) if mirrored else crop for crop, mirrored in zip(crops, flip)]
        return self._randaugmented(crops, keys) if self.style.randaugment else crops

    def crop_batch(self, images: Tensor, keys: Tensor) -> Tensor:
        crops = self._cropped_batch(images, *self._boxes(keys, *images.shape[2:]))
        if not self.style.randaugment:
            return crops
        small = crops.mul(255).round_().byte().cpu()  # slow, and on a GPU a trip to the host
        return torch.stack(self._randaugmented(small, keys)).to(images.device).float().div_(255)

    def finish(self, images: Tensor, keys: Tensor, colours: Colours) -> Tensor:
        return colours(self.style.apply(_to_float(images), keys, self.name))

    def told(self, key: int, height: int, width: int) -> dict[str, Any]:
        """crop (top, left, height, width in pixels), flip and, done where named, randaugment and the style's."""
        keys = torch.tensor([key])
        operations = {"randaugment": True} if self.style.randaugment else {}
        return self.placed(keys, height, width) | operations | self.style.told(keys, self.name)[0]

    def placed(self, keys: Tensor, height: int, width: int) -> dict[str, Any]:
        """crop and flip of the only one of `keys`."""
        (box,), (flip,) = (x.tolist() for x in self._boxes(keys, height, width))
        return {"crop": box, "flip": flip}

    def _geometry(self, keys: Tensor) -> dict[str, Tensor]:
        return {
            "crop": uniform(keys, 2 * augment.ATTEMPTS + 2, f"{self.name}/crop"),
            "flip": uniform(keys, 1, f"{self.name}/flip").squeeze(1) < 0.5,
        }

    def _boxes(self, keys: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
        drawn = self._geometry(keys)
        return augment.random_resized_crop_boxes(drawn["crop"], height, width, self.crop_scale), drawn["flip"]

    def _cropped(self, image: Tensor, box: list[int]) -> Tensor:
        """uint8 (3, H, W) -> (3, size, size)."""
        top, left, height, width = box
        return _resized(image[:, top : top + height, left : left + width], (self.size, self.size))

    def _cropped_batch(self, images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
        """float (N, 3, H, W) -> (N, 3, size, size), flipped too; boxes (N, 4) and flip (N,) on the CPU."""
        boxes, flip = (x.to(images.device, non_blocking=True) for x in (boxes, flip))
        return augment.separable(images, *augment.crop_matrices(boxes, flip, *images.shape[2:], self.size))

    def _randaugment(self, image: Image.Image, key: Tensor) -> Image.Image:
        """timm's draws from two global generators, so those are seeded for the call and put back."""
        state, numpy_state = random.getstate(), np.random.get_state()
        seed = int(hash64(key, f"{self.name}/randaugment")) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        image = _randaugment(self.style.randaugment)(image)
        random.setstate(state)
        np.random.set_state(numpy_state)
        return image

    def _randaugmented(self, images: Iterable[Tensor], keys: Tensor) -> list[Tensor]:
        """uint8 (3, H, W) each, through Pillow."""
        pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images)
        changed = [self._randaugment(picture, key) for picture, key in zip(pictures, keys.split(1))]
        return [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in changed]


@dataclass(frozen=True)
class Jigsaw:
    """Nine pieces of a crop, each from a random place in its cell of a 3 x 3 grid and in a style drawn for itself.

    PIRL (Misra & van der Maaten, CVPR 2020): cells of 85 pixels, pieces of 64. They are in reading order: a head that
    shuffles their embeddings does what shuffling the pieces would.
    """

    frame: View  # what is cut up

    @property
    def name(self) -> str:
        return self.frame.name

    def crop(self, images: Sequence[Tensor], keys: Tensor) -> Sequence[Tensor]:
        return self._pieces(torch.stack([*self.frame.crop(images, keys)]), keys)

    def crop_batch(self, images: Tensor, keys: Tensor) -> Tensor:
        return self._pieces(self.frame.crop_batch(images, keys), keys)

    def finish(self, images: Tensor, keys: Tensor, colours: Colours) -> Tensor:
        return self.frame.finish(images.flatten(0, 1), _piece_keys(keys).flatten(), colours).view(images.shape)

    def told(self, key: int, height: int, width: int) -> dict[str, Any]:
        """crop and flip of the whole, and pieces: each with its corner (top, left) therein and its style's."""
        keys = torch.tensor([key])
        corners, styles = self._corners(keys)[0].T.tolist(), self.frame.style.told(_piece_keys(keys)[0], self.name)
        pieces = [{"corner": corner} | style for corner, style in zip(corners, styles)]
        return self.frame.placed(keys, height, width) | {"pieces": pieces}

    def _pieces(self, images: Tensor, keys: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, 9, 3, piece, piece)."""
        top, left = self._corners(keys).to(images.device, non_blocking=True).unbind(1)
        sample = torch.arange(len(images), device=images.device).unsqueeze(1)
        return images.unfold(2, self._piece, 1).unfold(3, self._piece, 1)[sample, :, top, left]

    @property
    def _piece(self) -> int:
        return round(self.frame.size // GRID * 64 / 85)

    def _corners(self, keys: Tensor) -> Tensor:
        """Top and left of every piece, int64 (N, 2, 9)."""
        cell, number = self.frame.size // GRID, torch.arange(GRID**2)
        place = uniform(keys, 2 * GRID**2, f"{self.name}/pieces").view(-1, 2, GRID**2) * (cell - self._piece + 1)
        return place.long() + cell * torch.stack([number // GRID, number % GRID])


@dataclass(frozen=True)
class Centre:
    """Resize the shorter side, then crop the centre: to 256 and 224 pixels, or in that proportion.

    Small pictures are resized to `size` itself.
    """

    name: str
    size: int

    @property
    def side(self) -> int:
        return self.size * 256 // 224 if self.size > SMALL else self.size

    def crop(self, images: Sequence[Tensor], keys: Tensor) -> Sequence[Tensor]:
        return [F.center_crop(self._scaled(image), self.size) for image in images]

    def crop_batch(self, images: Tensor, keys: Tensor) -> Tensor:
        if min(images.shape[2:]) != self.side:
            images = F.resize(images, self._sides(*images.shape[2:]), antialias=True)
        return F.center_crop(images, self.size)

    def _scaled(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W)."""
        return _resized(image, self._sides(*image.shape[1:]))

    def _sides(self, height: int, width: int) -> list[int]:
        short = min(height, width)
        return [int(self.side * height / short), int(self.side * width / short)]

    def finish(self, images: Tensor, keys: Tensor, colours: Colours) -> Tensor:
        return colours(_to_float(images))

    def told(self, key: int, height: int, width: int) -> dict[str, Any]:
        return {"resize": self.side, "centre": self.size}


@dataclass(frozen=True)
class Recipe:
    """The looks of an image, one for each view, and the colours in which all of them are seen."""

    name: str
    looks: tuple[Look, ...]
    colours: Colours

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(look.name for look in self.looks)

    def only(self, views: Collection[str]) -> "Recipe":
        """The recipe with these of its views."""
        return replace(self, looks=tuple(look for look in self.looks if look.name in views))

    def crop(self, images: Sequence[Tensor], keys: Tensor) -> dict[str, Sequence[Tensor]]:
        """RGB images, uint8 (3, H, W), keys (N,) -> {view: N of uint8 (..., 3, size, size)}."""
        return {look.name: look.crop(images, keys) for look in self.looks}

    def crop_batch(self, images: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """uint8 (N, 3, H, W) on any device, keys (N,) on the CPU -> {view: float 0..1 (N, ..., 3, size, size)}."""
        images = images.float().div_(255)
        return {look.name: look.crop_batch(images, keys) for look in self.looks}

    def finish(self, views: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """Cropped views, uint8 or float 0..1 -> normalised float views of the same shape and device."""
        return {look.name: look.finish(views[look.name], keys, self.colours) for look in self.looks}

    def told(self, key: int, height: int, width: int) -> dict[str, dict[str, Any]]:
        """{view: what becomes of a picture of that size}."""
        return {look.name: look.told(key, height, width) for look in self.looks}


_MOCOV2 = Style(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)
_SIMCLR = replace(_MOCOV2, jitter=(0.8, 0.8, 0.8, 0.2), small_jitter=0.5)
_BYOL = replace(_MOCOV2, jitter=(0.4, 0.4, 0.2, 0.1))

# The views of an image take turns with the styles. None blurs small pictures or shears and shifts them by RandAugment.
RECIPES = {
    # MoCo (He et al., CVPR 2020), InsDis, PIRL and CMC as PyContrast has them.
    "mocov1": (Style(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_p=0.2),),
    "cmc": (Style(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0),),
    # MoCo v2 (Chen et al., arXiv 2003.04297); CMC v2 and InfoMin (Tian et al., NeurIPS 2020).
    "mocov2": (_MOCOV2,),
    "cmcv2": (replace(_MOCOV2, gray_p=0.0, randaugment=GENTLE),),
    "infomin": (replace(_SIMCLR, randaugment=ALL),),
    # SimCLR (Chen et al., ICML 2020, appendix A; B.9 for small pictures), and SwAV (Caron et al., NeurIPS 2020) as it.
    "simclr": (_SIMCLR,),
    "swav": (_SIMCLR,),
    # BYOL (Grill et al., NeurIPS 2020, appendix B).
    "byol": (replace(_BYOL, blur_p=1.0), replace(_BYOL, blur_p=0.1, solarize_p=0.2)),
}


def training(
    recipe: str,
    *,
    views: tuple[str, ...],
    input_res: int,
    crop_min: float,
    colours: Colours,
    small: tuple[int, int, float] = (0, 0, 0.0),
    jigsaw: bool = False,
) -> Recipe:
    """The recipe `recipe` (a name in RECIPES) for `views` of side input_res that cover crop_min or more of the picture.

    small: how many views "small0", "small1", ... to add, their side, and the smallest share they cover, the largest
    being crop_min (multi-crop, SwAV). jigsaw: add the view "jigsaw" of .6 or more of the picture, without blur,
    solarisation and RandAugment.
    """
    count, small_res, small_min = small
    styles = [_sized(style, input_res) for style in RECIPES[recipe]]
    crops = [(view, input_res, (crop_min, 1.0)) for view in views]
    crops += [(f"small{i}", small_res, (small_min, crop_min)) for i in range(count)]
    looks = [View(*crop, style) for crop, style in zip(crops, cycle(styles))]
    if jigsaw:
        style = replace(styles[0], blur_p=0.0, solarize_p=0.0, randaugment=())
        looks.append(Jigsaw(View("jigsaw", GRID * round(input_res * 255 / 224 / GRID), (0.6, 1.0), style)))
    return Recipe(recipe, tuple(looks), colours)


def probe(input_res: int, crop_scale: tuple[float, float], colours: Colours, *, randaugment: bool = False) -> Recipe:
    """Training view "image" of the linear probe: random resized crop and flip, on request RandAugment."""
    style = Style(randaugment=ALL if randaugment else ())
    return Recipe("probe", (View("image", input_res, crop_scale, style),), colours)


def evaluation(input_res: int, colours: Colours) -> Recipe:
    """Test view "image" of the evaluations."""
    return Recipe("evaluation", (Centre("image", input_res),), colours)


def _sized(style: Style, input_res: int) -> Style:
    if input_res > SMALL:
        return style
    return replace(style, jitter=tuple(style.small_jitter * x for x in style.jitter), blur_p=0.0, randaugment=())


@cache
def _randaugment(operations: tuple[str, ...]) -> Callable[[Image.Image], Image.Image]:
    """RandAugment (Cubuk et al., 2020): two of the operations, each left out half of the time, of magnitude 10."""
    from timm.data.auto_augment import rand_augment_transform  # slow to import

    known = [name for name in operations if name != "Identity"]  # which timm does not have
    transform = rand_augment_transform("rand-m10-n2-mstd0.5", {"img_mean": IMAGENET_GREY}, known)
    transform.ops += [lambda image: image] * (len(operations) - len(known))
    return transform


def _piece_keys(keys: Tensor) -> Tensor:
    """(N,) -> (N, 9): the pieces of a jigsaw are drawn apart."""
    return hash64(keys.unsqueeze(1), torch.arange(GRID**2))


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear and antialiased, as Pillow has it; uint8 (3, H, W), fastest where that lies pixel by pixel in memory."""
    return interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0)


def _to_float(images: Tensor) -> Tensor:
    """A contiguous float copy in 0..1 that may be changed in place."""
    copy = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copy if images.is_floating_point() else copy.div_(255)
