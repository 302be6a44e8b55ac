"""RandAugment (Cubuk et al., arXiv 1909.13719): operations drawn at random, of one magnitude.

The sixteen operations and their scale are those that AugReg was trained with (magnitude 10 is
AutoAugment's strongest, 15 and 20 go beyond; pixels are of images of 224), with one difference:
each does nothing or little at 0 and more with the magnitude. Theirs posterize to black and
solarize all at 0, and do less above. autocontrast, equalize and invert know no magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from matformer_dist.data.images.draws import below, signed

if TYPE_CHECKING:
    from PIL import Image

_GREY = 128  # where an operation leaves nothing
_MOST = 0.9  # of an image that is moved away or cut out

Operation = Callable[["Image.Image", float, Random], "Image.Image"]


def rand_augment(image: Image.Image, layers: int, magnitude: int, rng: Random) -> Image.Image:
    """`layers` operations one after the other; of an image in mode L or RGB, its size kept."""
    names = list(OPERATIONS)
    for _ in range(layers):
        image = OPERATIONS[names[below(len(names), rng)]](image, magnitude / 10, rng)
    return image


def _autocontrast(image: Image.Image, _strength: float, _rng: Random) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _strength: float, _rng: Random) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _invert(image: Image.Image, _strength: float, _rng: Random) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.invert(image)


def _rotate(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    from PIL.Image import Resampling

    degrees = signed(30 * strength, rng)
    return image.rotate(degrees, Resampling.BILINEAR, fillcolor=_grey(image))


def _posterize(image: Image.Image, strength: float, _rng: Random) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, max(1, 8 - round(4 * strength)))


def _solarize(image: Image.Image, strength: float, _rng: Random) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, max(0, round(256 * (1 - strength))))


def _solarize_add(image: Image.Image, strength: float, _rng: Random) -> Image.Image:
    added = round(110 * strength)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(name: str) -> Operation:
    def enhance(image: Image.Image, strength: float, rng: Random) -> Image.Image:
        from PIL import ImageEnhance

        factor = max(0.1, 1 + signed(0.9 * strength, rng))
        enhanced: Image.Image = getattr(ImageEnhance, name)(image).enhance(factor)
        return enhanced

    return enhance


def _shear_x(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    shear = signed(0.3 * strength, rng)
    return _affine(image, (1, shear, -shear * image.height / 2, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    shear = signed(0.3 * strength, rng)
    return _affine(image, (1, 0, 0, shear, 1, -shear * image.width / 2))


def _translate_x(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    pixels = round(min(_MOST, 100 / 224 * strength) * image.width)
    return _affine(image, (1, 0, signed(pixels, rng), 0, 1, 0))


def _translate_y(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    pixels = round(min(_MOST, 100 / 224 * strength) * image.height)
    return _affine(image, (1, 0, 0, 0, 1, signed(pixels, rng)))


def _cutout(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    """A square around any pixel, as far as it lies in the image."""
    side = round(min(_MOST, 80 / 224 * strength) * min(image.size))
    left = below(image.width, rng) - side // 2
    top = below(image.height, rng) - side // 2
    image = image.copy()
    image.paste(_grey(image), (left, top, left + side, top + side))
    return image


def _affine(image: Image.Image, data: tuple[float, ...]) -> Image.Image:
    """data: a b c d e f; the pixel at x, y comes from a x + b y + c, d x + e y + f."""
    from PIL.Image import Resampling, Transform

    return image.transform(
        image.size, Transform.AFFINE, data, Resampling.BILINEAR, fillcolor=_grey(image)
    )


def _grey(image: Image.Image) -> tuple[int, ...]:
    return (_GREY,) * len(image.getbands())


OPERATIONS: dict[str, Operation] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "cutout": _cutout,
}
