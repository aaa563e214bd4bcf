"""Colour spaces against scikit-image, and their normalisation against the range of 8-bit RGB."""

import pickle

import pytest
import torch
from skimage import color

from datasets.colours import colours

CONVERTERS = {
    "Lab": color.rgb2lab,
    "Luv": color.rgb2luv,
    "YCbCr": color.rgb2ycbcr,
    "YDbDr": color.rgb2ydbdr,
    "YPbPr": color.rgb2ypbpr,
    "YIQ": color.rgb2yiq,
    "YUV": color.rgb2yuv,
    "XYZ": color.rgb2xyz,
    "CIERGB": color.rgb2rgbcie,
    "HSV": color.rgb2hsv,
    "HED": color.rgb2hed,
}
PLAIN = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def cube():
    """The whole RGB cube in steps of 15 as images (18, 3, 18, 18), double: black, white, greys and all corners."""
    steps = torch.arange(0, 256, 15).double() / 255
    return torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=1)


def column(x):
    return torch.tensor(x).view(1, 3, 1, 1)


@pytest.mark.parametrize("space", CONVERTERS)
def test_conversions_equal_scikit_image(cube, space):
    chosen = colours("CMC", space, *PLAIN)
    expected = torch.from_numpy(CONVERTERS[space](cube.numpy(), channel_axis=1))
    ours = chosen(cube.float())
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert (ours - (expected - column(chosen.mean)) / column(chosen.std)).abs().max() < 1e-4


@pytest.mark.parametrize("space", CONVERTERS)
def test_every_channel_spans_two_and_is_centred_unless_published_otherwise(cube, space):
    channels = colours("CMC", space, *PLAIN)(cube.float()).transpose(0, 1).flatten(1)
    low, high = channels.amin(1), channels.amax(1)
    assert ((high - low) / 2 - 1).abs().max() < 0.01
    off_centre = 0.2 if space in ("YCbCr", "YDbDr") else 0.01  # the means of photographs
    assert ((high + low) / 2).abs().max() < off_centre


def test_published_constants():
    """Of CMC (Lab and YCbCr, the latter in 0..255) and PyContrast (YDbDr)."""
    assert colours("CMC", "Lab", *PLAIN).std == (50, 92.208, 101.1675)
    assert colours("CMC", "YCbCr", *PLAIN).mean == (116.151, 121.080, 132.342)
    assert colours("CMC", "YDbDr", *PLAIN).mean == (0.457, -0.082, -0.052)


def test_rgb_is_only_normalised(cube):
    images = cube.float()
    expected = (images - column(PLAIN[0])) / column(PLAIN[1])
    assert torch.equal(colours("RGB", "Lab", *PLAIN)(images), expected)


@pytest.mark.parametrize("space", ("RGB", *CONVERTERS))
def test_the_host_never_waits_and_spawned_workers_get_a_copy(space):
    chosen = colours("RGB" if space == "RGB" else "CMC", space, *PLAIN)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert chosen(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 3, 8, 8)
