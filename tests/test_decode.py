"""Odd image files: what comes out upright and in RGB, and what is refused."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets import decode
from datasets.decode import read_by_pillow, read_image

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((40, 30), Image.Resampling.BICUBIC)


def pixels(image):
    image = np.asarray(image if isinstance(image, Image.Image) else image.permute(1, 2, 0))
    assert image.shape[2] == 3 and image.dtype == np.uint8
    return image.astype(int)


def read(path, image, **options):
    image.save(path, **options)
    return pixels(read_image(str(path)))


def test_ordinary_files_come_out_as_pillow_decodes_them(tmp_path):
    for name in ("a.jpg", "a.png", "a.bmp", "a.ppm", "a.tif", "a.webp"):
        assert np.array_equal(read(tmp_path / name, PICTURE), pixels(Image.open(tmp_path / name).convert("RGB")))


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", *range(2, 9)])
def test_jpegs_come_out_as_pillow_decodes_them_with_torchvision_and_without(tmp_path, monkeypatch, mode, without):
    """Numbers are orientations."""
    if without:
        monkeypatch.setattr(decode, "decode_jpeg", None)
    exif = Image.Exif()
    if isinstance(mode, int):
        exif[0x0112] = mode
    found = read(tmp_path / "a.jpg", PICTURE.convert("RGB" if isinstance(mode, int) else mode), exif=exif)
    assert np.array_equal(found, pixels(read_by_pillow(str(tmp_path / "a.jpg"))))
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(found, pixels(ImageOps.exif_transpose(image).convert("RGB")))


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: lambda x: np.rot90(x)}
    found = read(tmp_path / f"a.{ending}", PICTURE, exif=exif, **{"lossless": True} if ending == "webp" else {})
    assert found.shape == ((30, 40, 3) if orientation < 5 else (40, 30, 3))
    if orientation in turned:
        assert np.array_equal(found, turned[orientation](pixels(PICTURE)))


def test_jpeg_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = read(tmp_path / "a.jpg", PICTURE), read(tmp_path / "b.jpg", PICTURE, exif=exif)
    assert np.array_equal(turned, np.rot90(plain, -1))
    damaged = (tmp_path / "b.jpg").read_bytes().replace(b"MM\x00*", b"MM\x00*"[::-1]).replace(b"II*\x00", b"\0*II")
    (tmp_path / "b.jpg").write_bytes(damaged)
    assert np.array_equal(pixels(read_image(str(tmp_path / "b.jpg"))), plain), "damaged EXIF data are ignored"


def test_transparent_parts_are_white(tmp_path):
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
    alpha = np.asarray(image)[..., 3:] / 255
    expected = pixels(PICTURE) * alpha + 255 * (1 - alpha)
    assert abs(read(tmp_path / "rgba.png", image) - expected).max() <= 1
    grey = np.asarray(image.convert("LA"))[..., :1] * alpha + 255 * (1 - alpha)
    assert abs(read(tmp_path / "la.png", image.convert("LA")) - grey).max() <= 1
    flat = Image.new("P", (2, 1))
    flat.putpalette([10, 20, 30, 200, 100, 50])
    flat.putdata([0, 1])
    assert read(tmp_path / "p.png", flat).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert read(tmp_path / "p.png", flat, transparency=0).tolist() == [[[255] * 3, [200, 100, 50]]]
    rgb = flat.convert("RGB")
    assert read(tmp_path / "rgb.png", rgb, transparency=(200, 100, 50)).tolist() == [[[10, 20, 30], [255] * 3]]


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk(tmp_path, ending):
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    assert abs(read(tmp_path / f"a.{ending}", smooth.convert("CMYK")) - pixels(smooth)).max() < 6


def test_grey_and_black_and_white(tmp_path):
    grey = PICTURE.convert("L")
    assert np.array_equal(read(tmp_path / "l.png", grey), pixels(grey.convert("RGB")))
    assert set(read(tmp_path / "1.png", grey.convert("1")).ravel()) == {0, 255}


@pytest.mark.parametrize("name, mode", [("a.png", "I;16"), ("a.tif", "I;16"), ("a.tif", "I;16B"), ("a.tif", "I")])
def test_sixteen_bits_are_scaled(tmp_path, name, mode):
    values = np.array([[0, 257, 32768, 65535]])
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (4, 1), values.astype(kind).tobytes())
    assert read(tmp_path / name, image)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_a_picture_cut_short_is_used(tmp_path):
    path = tmp_path / "a.jpg"
    large = PICTURE.resize((400, 300))
    whole = read(path, large)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    torn = pixels(read_image(str(path)))
    assert torn.shape == whole.shape and np.array_equal(torn[:80], whole[:80]) and not np.array_equal(torn, whole)


def test_a_jpeg_of_too_many_pixels_is_refused_by_its_header(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    monkeypatch.setattr(decode, "decode_jpeg", None if decode.decode_jpeg is None else pytest.fail)
    with pytest.raises(ValueError, match="a.jpg cannot be read as an image .*1200 pixels"):
        read_image(str(tmp_path / "a.jpg"))


def five_channels():
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 122), (277, 5), (278, 1), (279, 5)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bytes(5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_bytes(b"no image"), "cannot be read as an image .*; convert, repair or remove it"),
        (lambda path: path.write_bytes(b""), "cannot be read as an image"),
        (lambda path: path.write_bytes(five_channels()), "cannot be read as an image"),
        (lambda path: path.mkdir(), "cannot be read as an image"),
        (lambda path: None, "No such file"),
        (lambda path: Image.new("F", (4, 4)).save(path), "its pixels are floating-point numbers"),
        (lambda path: Image.new("I", (4, 4), 70000).save(path), "outside of the 16-bit range"),
        (lambda path: Image.new("I", (4, 4), -1).save(path), "outside of the 16-bit range"),
        (lambda path: Image.new("1", (20000, 20000)).save(path, compression="group4"), "decompression bomb"),
    ],
)
def test_what_is_refused(tmp_path, make, message):
    make(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif .*{message}|a.tif {message}") as refused:
        read_image(str(tmp_path / "a.tif"))
    assert "\n" not in str(refused.value)
