"""Geometry and colour against Pillow and torchvision, sample by sample."""

import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from datasets import augment, photometric


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("size", [8, 24, 64])  # down, mixed, up
def test_crops_equal_pillow_and_torchvision(draw, size):
    height, width, n = 37, 50, 60
    image = (torch.rand(3, height, width, generator=draw) * 255).byte()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    boxes = augment.random_resized_crop_boxes(torch.rand(n, 22, generator=draw), height, width, (0.08, 1.0))
    flip = torch.arange(n) % 2 == 0
    rows, cols = augment.crop_matrices(boxes, flip, height, width, size)
    crops = augment.separable(image.float().expand(n, -1, -1, -1), rows, cols)
    for crop, mirrored, (top, left, h, w) in zip(crops, flip, boxes.tolist()):
        part = F.resize(image[:, top : top + h, left : left + w].float(), [size, size], antialias=True)
        pillow = picture.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
        pillow = F.pil_to_tensor(pillow).float()
        if mirrored:
            part, pillow = part.flip(-1), pillow.flip(-1)
        assert (crop - part).abs().max() < 1e-3
        assert (crop - pillow).abs().max() < 1.01  # Pillow rounds after either pass


def test_boxes_stay_inside_and_fall_back_to_the_centre(draw):
    u = torch.rand(2000, 22, generator=draw)
    for height, width in [(32, 32), (10, 90), (500, 375)]:
        top, left, h, w = augment.random_resized_crop_boxes(u, height, width, (0.08, 1.0)).unbind(1)
        assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()
    wide = augment.random_resized_crop_boxes(u[:5], 10, 90, (0.99, 1.0))
    assert torch.equal(wide, torch.tensor([0, (90 - 13) // 2, 10, 13]).expand(5, 4))
    tall = augment.random_resized_crop_boxes(u[:5], 90, 10, (0.99, 1.0))
    assert torch.equal(tall, torch.tensor([(90 - 13) // 2, 0, 13, 10]).expand(5, 4))


def test_boxes_are_distributed_as_torchvisions(draw):
    n, image = 4000, torch.empty(3, 60, 80)
    ours = augment.random_resized_crop_boxes(torch.rand(n, 22, generator=draw), 60, 80, (0.2, 1.0)).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    theirs = torch.tensor(theirs).float()
    for mine, other in zip(ours.T, theirs.T):
        grid = torch.arange(81)
        gap = (mine[:, None] <= grid).float().mean(0) - (other[:, None] <= grid).float().mean(0)
        assert gap.abs().max() < 1.95 * (2 / n) ** 0.5  # two-sample Kolmogorov-Smirnov, p = 0.001


def test_whole_image_crop_is_the_identity(draw):
    images = torch.rand(2, 3, 32, 32, generator=draw)
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(2, 4)
    matrices = augment.crop_matrices(boxes, torch.tensor([False, True]), 32, 32, 32)
    assert torch.equal(augment.separable(images, *matrices), torch.stack([images[0], images[1].flip(-1)]))


def test_blur_equals_torchvision(draw):
    images, sigma = torch.rand(4, 3, 40, 33, generator=draw), torch.tensor([0.0, 0.1, 0.9, 2.0])
    blurred = photometric.blur(images.clone(), sigma)
    assert torch.equal(blurred[0], images[0])
    for i in (1, 2, 3):
        assert (blurred[i] - F.gaussian_blur(images[i], [31, 31], sigma[i].item())).abs().max() < 1e-5


ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def colourful(draw, n):
    """Random images, some with flat, grey, black or saturated regions, where hue has its special cases."""
    images = torch.rand(n, 3, 12, 12, generator=draw)
    images[: n // 2] = (images[: n // 2] * 3).round() / 3
    images[0], images[1], images[2] = 0.0, 1.0, images[2, :1]
    return images


def draw_factors(draw, n):
    factors = torch.rand(n, 4, generator=draw) * 1.4 + 0.3
    factors[:, 3] = (factors[:, 3] - 1) * 0.7
    return factors


@pytest.mark.parametrize("number, tolerance", [(0, 1e-6), (1, 1e-6), (2, 1e-6), (3, 1e-4)])
def test_each_adjustment_equals_torchvision(draw, number, tolerance):
    images, factor = colourful(draw, 40), draw_factors(draw, 40)[:, number]
    expected = torch.stack([ADJUST[number](image, f.item()) for image, f in zip(images, factor)])
    assert (photometric.OPERATIONS[number](images, factor) - expected).abs().max() < tolerance


def test_color_jitter_follows_each_samples_order(draw):
    n = 60
    images, factors = colourful(draw, n), draw_factors(draw, n)
    order = torch.rand(n, 4, generator=draw).argsort(1)
    order[5] = -1
    expected = images.clone()
    for i in range(n):
        for number in order[i].tolist() if i != 5 else ():
            expected[i] = ADJUST[number](expected[i], factors[i, number].item())
    names = ("brightness", "contrast", "saturation", "hue")
    jittered = photometric.color_jitter(images.clone(), order=order, **dict(zip(names, factors.T)))
    assert (jittered - expected).abs().max() < 1e-4
    assert torch.equal(jittered[5], images[5])


def test_grayscale_touches_only_the_chosen(draw):
    images, mask = colourful(draw, 6), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    gray = photometric.grayscale(images.clone(), mask)
    assert torch.equal(gray[~mask], images[~mask])
    assert torch.allclose(gray[mask], F.rgb_to_grayscale(images[mask], 3), atol=1e-6)


def test_solarize_equals_torchvision_on_the_chosen(draw):
    images, mask = colourful(draw, 6), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    images[3] = 0.5
    changed = photometric.solarize(images.clone(), mask)
    assert torch.equal(changed[~mask], images[~mask])
    assert torch.equal(changed[mask], F.solarize(images[mask], 0.5))
