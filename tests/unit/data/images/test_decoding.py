from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from matformer_dist.data.images.decoding import BrokenImageError, decode_image, in_channels
from tests.unit.data.images.pictures import encoded, noise


def pixels(data: bytes, channels: int = 3) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    image = decode_image(data, channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(image).astype(np.int64)


def test_rgb_and_grey_come_as_they_are() -> None:
    image = noise(9, 7)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image))
    grey = image.convert("L")
    assert np.array_equal(pixels(encoded(grey), 1), np.asarray(grey))
    assert np.array_equal(pixels(encoded(grey), 3), np.asarray(grey)[:, :, None].repeat(3, 2))
    luma = np.asarray(image) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(encoded(image), 1) - luma).max() <= 1


def test_other_formats_are_read() -> None:
    image = noise(40, 32)
    for kind in ("jpeg", "webp"):
        found = pixels(encoded(image, kind, quality=95))
        assert 0 < np.abs(found - np.asarray(image)).mean() < 12
    for kind in ("bmp", "tiff", "ppm"):
        assert np.array_equal(pixels(encoded(image, kind)), np.asarray(image))


def test_a_palette_gives_its_colours() -> None:
    image = noise(9, 7).quantize(16)
    assert image.mode == "P"
    assert np.array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))


def test_what_is_transparent_shows_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 51))  # a fifth of it
    fifth = [round(0.2 * value + 0.8 * 255) for value in (10, 20, 30)]
    assert np.abs(pixels(encoded(image))[0] - [[10, 20, 30], fifth]).max() <= 1
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encoded(grey), 1).tolist() == [[255]]
    palette = noise(9, 7).quantize(4)
    hole = np.asarray(palette) == 2
    found = pixels(encoded(palette, transparency=2))
    assert hole.any() and (found[hole] == 255).all()
    assert np.array_equal(found[~hole], np.asarray(palette.convert("RGB"))[~hole])
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    assert pixels(encoded(keyed, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9] * 3]]


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    found = pixels(encoded(image.convert("CMYK"), "jpeg", quality=100))
    assert np.abs(found - [200, 100, 50]).max() <= 3


def test_of_16_bits_the_upper_8_are_kept() -> None:
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    for kind in ("png", "tiff"):
        found = pixels(encoded(Image.fromarray(values), kind), 1)
        assert found.tolist() == [[0, 0, 1, 156, 255]]
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert np.asarray(in_channels(wide, 3))[0, :, 1].tolist() == [0, 0, 1, 156, 255]


def test_bits_become_black_and_white() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[True, False]]))), 1).tolist() == [[255, 0]]


def test_the_first_of_moving_images_is_taken() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (pixels(data) == 0).all()


@pytest.mark.parametrize("orientation", range(10))
def test_images_stand_upright_as_pillow_has_it(orientation: int) -> None:
    image = noise(12, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "jpeg", exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened)
        assert np.array_equal(pixels(data), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_spoils_no_pixels() -> None:
    image = noise(12, 8)
    data = encoded(image, "jpeg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(pixels(data), pixels(encoded(image, "jpeg")))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "tiff"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    data = encoded(noise(64, 48), kind)
    with pytest.raises(BrokenImageError):
        decode_image(data[: int(part * len(data))], 3)


def test_what_is_no_image_is_refused() -> None:
    for data in (b"", b"GIF8", b"<html>not found</html>"):
        message = f"^{len(data)} bytes of no image format that Pillow knows$"
        with pytest.raises(BrokenImageError, match=message):
            decode_image(data, 3)
    damaged = bytearray(encoded(noise(64, 48)))
    damaged[100:140] = bytes(40)
    with pytest.raises(BrokenImageError):
        decode_image(bytes(damaged), 3)


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(9, 7))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(BrokenImageError, match=r"63 pixels.*decompression bomb"):
        decode_image(data, 3)


def test_pixels_of_unknown_scale_are_refused() -> None:
    with pytest.raises(BrokenImageError, match="floating-point numbers of unknown scale; use 8"):
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "tiff"), 3)
    for value in (-1, 1 << 16):
        with pytest.raises(BrokenImageError, match=rf"pixels from {value} to {value} are no 16"):
            decode_image(encoded(Image.new("I", (2, 2), value), "tiff"), 3)
