"""Recipes: views as published, the same from a file and from memory, and nothing random but what a key says."""

import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from datasets import augment, recipes
from datasets.colours import colours
from datasets.keyed import sample_keys
from datasets.one_by_one import one_by_one
from datasets.recipes import RECIPES, evaluation, probe, training
from datasets.sources import CIFAR

PAIR = ("query", "key")
PLAIN = colours("RGB", "Lab", *CIFAR)
KEYS = torch.arange(4000)
UNIT = colours("RGB", "Lab", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
EITHER_WAY = pytest.mark.parametrize("made", [lambda recipe: recipe, one_by_one], ids=["batches", "one by one"])


def recipe(name, res, **more):
    return training(name, **({"views": PAIR, "input_res": res, "crop_min": 0.2, "colours": PLAIN} | more))


def drawn(name, res, view="query"):
    looks = {look.name: look for look in recipe(name, res).looks}
    return looks[view].parameters(KEYS)


@pytest.fixture
def images():
    return (torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).byte()


def close(values, share):
    return abs(values.float().mean().item() - share) < 0.03


def within(values, low, high):
    return low - 1e-6 <= values.min() < low + 0.02 and high - 0.02 < values.max() <= high + 1e-6


# brightness, contrast, saturation, hue; how often jitter, grey, blur
PUBLISHED = {
    "mocov1": ((0.4, 0.4, 0.4, 0.4), 1.0, 0.2, 0.0),
    "cmc": ((0.4, 0.4, 0.4, 0.1), 1.0, 0.0, 0.0),
    "mocov2": ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5),
    "cmcv2": ((0.4, 0.4, 0.4, 0.1), 0.8, 0.0, 0.5),
    "infomin": ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5),
    "simclr": ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5),
    "swav": ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5),
    "byol": ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1.0),
}


@pytest.mark.parametrize("res", [224, 32])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_draw_as_published(name, res):
    jitter, jitter_p, gray_p, blur_p = PUBLISHED[name]
    strength = 0.5 if res == 32 and name in ("simclr", "swav", "infomin") else 1.0
    values = drawn(name, res)
    assert close(values["flip"], 0.5)
    assert close(values["order"][:, 0] >= 0, jitter_p) and close(values["gray"], gray_p)
    for factor, width in zip(("brightness", "contrast", "saturation"), jitter):
        assert within(values[factor], 1 - width * strength, 1 + width * strength)
    assert within(values["hue"], -jitter[3] * strength, jitter[3] * strength)
    sigma = values["sigma"]
    assert close(sigma > 0, blur_p if res == 224 else 0.0)
    assert not sigma.any() or within(sigma[sigma > 0], 0.1, 2.0)
    assert not values["solarize"].any()


def test_views_are_drawn_apart():
    query, key = drawn("mocov1", 224), drawn("mocov1", 224, "key")
    assert not any(torch.equal(query[name], key[name]) for name in ("crop", "flip", "order", "hue", "gray"))


def test_only_byol_treats_its_two_views_differently():
    key = drawn("byol", 224, "key")
    assert close(key["sigma"] > 0, 0.1) and close(key["solarize"], 0.2)
    assert close(drawn("byol", 32, "key")["solarize"], 0.2)
    for name in set(RECIPES) - {"byol"}:
        query, key = (look.style for look in recipe(name, 224).looks)
        assert query == key


@EITHER_WAY
def test_finish_applies_what_parameters_says(made):
    chosen, keys = made(recipe("byol", 65)), sample_keys(0, 0, torch.arange(20))
    crops = (torch.rand(20, 3, 65, 65, generator=torch.Generator().manual_seed(1)) * 255).byte()
    kept, look = crops.clone(), chosen.looks[1]
    values, finished = look.parameters(keys), chosen.finish(dict.fromkeys(PAIR, crops), keys)["key"]
    assert torch.equal(crops, kept), "finish must not change its input"
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    factors = [values[name].tolist() for name in ("brightness", "contrast", "saturation", "hue")]
    assert values["solarize"].any() and (values["sigma"] > 0).any() and values["gray"].any()
    for i in range(20):
        image = crops[i].float() / 255
        for number in values["order"][i].tolist():
            image = adjust[number](image, factors[number][i]) if number >= 0 else image
        image = F.rgb_to_grayscale(image, 3) if values["gray"][i] else image
        sigma = values["sigma"][i].item()
        image = F.gaussian_blur(image, [31, 31], sigma) if sigma > 0 else image
        if values["solarize"][i]:
            image = F.solarize(image, 0.5)
        assert (finished[i] - F.normalize(image, *CIFAR)).abs().max() < 1e-3


@EITHER_WAY
def test_file_and_memory_crops_agree(images, made):
    """The worker path rounds to uint8 after either pass of the resizing, the batched path does not."""
    chosen = made(recipe("mocov2", 48, small=(2, 16, 0.05), jigsaw=True))
    keys = sample_keys(0, 0, torch.arange(20))
    batched = chosen.crop_batch(images, keys)
    assert chosen.views == tuple(batched) == ("query", "key", "small0", "small1", "jigsaw")
    singles = chosen.crop([*images], keys)
    for view in chosen.views:
        single = torch.stack([*singles[view]])
        assert single.dtype == torch.uint8 and single.shape == batched[view].shape
        assert (single.float() / 255 - batched[view]).abs().max() < 1.02 / 255
        for i in (0, 7):
            assert torch.equal(chosen.crop([images[i]], keys[i : i + 1])[view][0], single[i])


@EITHER_WAY
def test_crops_are_those_of_pillow_whatever_the_sizes(made):
    """Decoded images differ in size; torchvision's kernel rounds its weights otherwise, by one level at most."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (*size, 3), generator=generator).byte() for size in ((60, 80), (31, 47), (90, 20))]
    keys, look = torch.arange(3), made(recipe("mocov2", 48)).looks[0]
    drawn = look.parameters(keys)
    for i, (crop, image) in enumerate(zip(look.crop([image.permute(2, 0, 1) for image in images], keys), images)):
        box = augment.random_resized_crop_boxes(drawn["crop"][i : i + 1], *image.shape[:2], look.crop_scale)
        top, left, height, width = box[0].tolist()
        picture = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
        expected = F.pil_to_tensor(picture.resize((48, 48), Image.Resampling.BILINEAR))
        expected = expected.flip(2) if drawn["flip"][i] else expected
        assert (crop.int() - expected.int()).abs().max() <= (0 if made is one_by_one else 1)


@pytest.mark.parametrize("name", ["byol", "infomin"])
def test_views_one_by_one_are_those_of_batches(images, name):
    batches = recipe(name, 80, small=(2, 16, 0.05), jigsaw=True)
    single, keys = one_by_one(batches), sample_keys(0, 0, torch.arange(20))
    assert single.told(7, 60, 80) == batches.told(7, 60, 80)
    crops, slow = batches.crop([*images], keys), single.crop([*images], keys)
    for view in batches.views:
        found, expected = (torch.stack([*made[view]]).int() for made in (slow, crops))
        exact = name != "infomin" or "jigsaw" in view  # RandAugment equalizes and posterizes: a level may become many
        assert (found - expected).abs().max() <= 1 if exact else ((found - expected).abs() <= 1).float().mean() > 0.95
    ours, theirs = (made.crop_batch(images, keys) for made in (batches, single))
    for view in batches.views:
        if name != "infomin" or view == "jigsaw":
            torch.testing.assert_close(theirs[view], ours[view], rtol=0, atol=1e-5)
    finished = [made.finish(ours, keys) for made in (batches, single)]
    torch.testing.assert_close(*finished, rtol=0, atol=1e-4)


def test_small_views_cover_the_shares_below_crop_min():
    looks = recipe("swav", 224, crop_min=0.14, small=(6, 96, 0.05)).looks
    assert [look.name for look in looks] == [*PAIR, *(f"small{i}" for i in range(6))]
    assert [look.size for look in looks] == 2 * [224] + 6 * [96]
    for look, low, high in [(looks[0], 0.14, 1.0), (looks[5], 0.05, 0.14)]:
        u = look.parameters(KEYS)["crop"]
        height, width = augment.random_resized_crop_boxes(u, 500, 500, look.crop_scale)[:, 2:].unbind(1)
        share = height * width / 500**2
        assert low - 0.003 < share.min() < low + 0.02 and high - 0.02 < share.max() < high + 0.003  # whole pixels
    assert not torch.equal(looks[2].parameters(KEYS)["crop"], looks[3].parameters(KEYS)["crop"])


def test_a_memory_bank_needs_one_view(images):
    chosen, keys = recipe("mocov1", 32, views=("query",)), sample_keys(0, 0, torch.arange(20))
    assert chosen.views == ("query",)
    pair = recipe("mocov1", 32)
    alone, both = (r.finish(r.crop_batch(images, keys), keys)["query"] for r in (chosen, pair))
    assert torch.equal(alone, both)


@pytest.mark.parametrize("res, side, piece", [(224, 255, 64), (32, 36, 9)])
def test_jigsaw_pieces_come_from_their_own_cell(res, side, piece):
    """Red tells the column of the picture, green the row; a crop only scales and shifts them, a flip mirrors red."""
    jigsaw = recipe("mocov1", res, jigsaw=True).looks[-1]
    assert jigsaw.frame.size == side and jigsaw.frame.crop_scale == (0.6, 1.0)
    ramp = (torch.arange(side) / side).expand(side, side)
    picture, n = torch.stack([ramp, ramp.T, torch.zeros(side, side)]), 60
    pieces = jigsaw._pieces(picture.expand(n, -1, -1, -1), torch.arange(n))
    assert pieces.shape == (n, 9, 3, piece, piece)
    left, top = (pieces[:, :, channel, 0, 0].mul(side).round().long() for channel in (0, 1))
    cell, number = side // 3, torch.arange(9)
    for corner, first in [(left, number % 3 * cell), (top, number // 3 * cell)]:
        offset = corner - first
        assert offset.min() == 0 and offset.max() == cell - piece
        assert len(offset[:, 0].unique()) > 2 and not torch.equal(offset[:, 0], offset[:, 1])
    whole = torch.stack([picture[:2, t : t + piece, s : s + piece] for t, s in zip(top[7], left[7])])
    assert torch.equal(pieces[7, :, :2], whole)


def test_each_jigsaw_piece_has_colours_of_its_own():
    jigsaw = recipe("infomin", 224, jigsaw=True).looks[-1]
    style = jigsaw.frame.style
    assert style.randaugment == () and style.blur_p == 0.0 and style.gray_p == 0.2
    flat = torch.tensor([0.6, 0.4, 0.2]).view(1, 1, 3, 1, 1).expand(8, 9, 3, 6, 6)
    finished = jigsaw.finish(flat, torch.arange(8), UNIT)
    assert finished.shape == flat.shape
    assert all(len(row.unique(dim=0)) > 5 for row in finished[..., 0, 0])
    again = jigsaw.finish(flat[2:3], torch.tensor([2]), UNIT)
    assert torch.allclose(again, finished[2:3], atol=1e-6)


def test_cmc_views_hold_the_colour_space(images):
    chosen, plain = (recipe("cmc", 32, colours=seen) for seen in (colours("CMC", "YDbDr", *CIFAR), UNIT))
    keys = sample_keys(0, 0, torch.arange(20))
    ours, rgb = (r.finish(r.crop_batch(images, keys), keys)["key"] for r in (chosen, plain))
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    assert torch.allclose(ours[:, 0], (luma - 0.457) / 0.5, atol=1e-5)


def test_randaugment_has_the_published_operations():
    assert len(recipes.ALL) == 15 and len(recipes.GENTLE) == 8
    chosen = {name: recipe(name, 224).looks[0].style.randaugment for name in RECIPES}
    assert {name for name, operations in chosen.items() if operations} == {"infomin", "cmcv2"}
    assert chosen["infomin"] == recipes.ALL and chosen["cmcv2"] == recipes.GENTLE
    for operations in (recipes.ALL, recipes.GENTLE):
        transform = recipes._randaugment(operations)
        assert len(transform.ops) == len(operations) and transform.num_layers == 2
        named = [op for op in transform.ops if hasattr(op, "name")]
        assert {op.name for op in named} == set(operations) - {"Identity"}
        assert {(op.magnitude, op.magnitude_std, op.prob) for op in named} == {(10, 0.5, 0.5)}


def test_randaugment_hangs_on_the_key_alone(images):
    chosen = probe(32, (0.2, 1.0), PLAIN, randaugment=True)
    before, numpy_before = random.getstate(), np.random.get_state()[1].copy()
    crops = chosen.crop(30 * [images[0]], torch.arange(30))["image"]
    assert random.getstate() == before and (np.random.get_state()[1] == numpy_before).all()
    random.seed(5)
    np.random.seed(5)
    assert torch.equal(torch.stack(chosen.crop(30 * [images[0]], torch.arange(30))["image"]), torch.stack(crops))
    batched = chosen.crop_batch(images[:1].expand(30, -1, -1, -1), torch.arange(30))["image"]
    plain = probe(32, (0.2, 1.0), PLAIN).crop_batch(images[:1].expand(30, -1, -1, -1), torch.arange(30))["image"]
    changed = (batched - plain).abs().amax((1, 2, 3)) > 0.02
    assert 10 < changed.sum() < 30  # a quarter keeps both operations off, and some do little to noise


def test_draws_never_change():
    """A run that goes on from a checkpoint has to see the views that it would have seen; these numbers are old."""
    values = {name: value[:3] for name, value in drawn("mocov2", 224).items()}
    assert values["crop"][:, 0].tolist() == pytest.approx([0.179624, 0.469166, 0.170412], abs=1e-6)
    assert values["flip"].tolist() == [True, False, False]
    assert values["brightness"].tolist() == pytest.approx([0.895435, 1.192997, 0.745822], abs=1e-6)
    assert values["hue"].tolist() == pytest.approx([-0.087922, 0.085850, -0.018520], abs=1e-6)
    assert values["order"][:, :2].tolist() == [[-1, -1], [2, 1], [1, 2]]
    assert values["sigma"].tolist() == pytest.approx([0, 1.477524, 0.501296], abs=1e-6)


@EITHER_WAY
def test_evaluation_view_is_resize_then_centre_crop(images, made):
    chosen = made(evaluation(224, PLAIN))
    pixels = F.resize(torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)), [70, 90])[0]
    picture = F.to_pil_image(pixels)
    expected = F.pil_to_tensor(F.center_crop(F.resize(picture, 256), 224))
    (ours,) = chosen.crop([F.pil_to_tensor(picture)], torch.zeros(1))["image"]
    assert ours.shape == expected.shape and (ours.int() - expected.int()).abs().max() <= 1
    large = chosen.crop_batch(F.pil_to_tensor(picture)[None], torch.zeros(1, dtype=torch.int64))["image"][0]
    assert (large - expected / 255).abs().max() < 1.5 / 255
    small = made(evaluation(32, PLAIN)).crop_batch(images, torch.arange(20))["image"]
    assert torch.equal(small, images / 255)
