"""Bytes of an image file become grey or RGB pixels, or one error that says why not."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
_ORIENTATION = 0x0112  # EXIF's tag


class BrokenImageError(ValueError):
    """What is wrong with an image, for whoever knows its name to say."""


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Of a file's bytes, upright, in mode L or RGB; of moving images the first.

    BrokenImageError for what Pillow does not read: damaged or truncated files, other formats, and
    images of so many pixels (Pillow's limit, 179 million) that they may be made to fill memory.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return in_channels(_upright(image), channels)
    except BrokenImageError:
        raise
    except UnidentifiedImageError:
        raise BrokenImageError(f"{len(data)} bytes of no image format that Pillow knows") from None
    except Exception as error:  # a damaged file may raise nearly anything in a decoder
        raise BrokenImageError(str(error) or type(error).__name__) from None


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """In mode L (channels 1) or RGB (3); BrokenImageError where its values have no fixed scale.

    What is transparent shows white. Of 16 bits the upper 8 are kept.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        image = _of_16_bits(image)
    if image.mode == "F":
        raise BrokenImageError("pixels are floating-point numbers of unknown scale; use 8 bits")
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Pillow itself would clip at 255. Older versions give 16 bits in the 32 of mode I."""
    from PIL import Image

    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high >= 1 << 16:
        raise BrokenImageError(f"pixels from {low} to {high} are no 16 bits; use 8 or 16 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says that the camera was held; as it is where EXIF cannot be read."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF spoils no pixels
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
