"""Random changes of a training image, in AugReg's order: crop, flip, RandAugment.

Shifts and rotations, which are for images of some pixels, come before RandAugment.
"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

from torch import Tensor

from matformer_dist.config_images import AugmentationConfig
from matformer_dist.data.images.draws import below, between
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.data.images.rand_augment import rand_augment
from matformer_dist.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_ATTEMPTS = 10  # at a crop of a drawn area and ratio that lies in the image


class Augmentation:
    """What is drawn for sample i follows from (seed, i) alone."""

    def __init__(self, config: AugmentationConfig, preprocessing: Preprocessing, seed: int) -> None:
        if config.shift >= preprocessing.image_size:
            raise UserError(
                f"data.augmentation.shift {config.shift} moves images of "
                f"{preprocessing.image_size} pixels out of sight; set it to a few pixels"
            )
        self.config, self.chosen = config, config.chosen
        self.preprocessing, self.seed = preprocessing, seed

    def __call__(self, image: Image.Image, sample: int) -> Tensor:
        """fp32 [C, image_size, image_size] of an image in mode L or RGB."""
        rng = Random(f"augmentation:{self.seed}:{sample}")
        return self.preprocessing.normalized(self.changed(image, rng))

    def changed(self, image: Image.Image, rng: Random) -> Image.Image:
        """Of image_size x image_size pixels."""
        from PIL.Image import Resampling, Transpose

        size = self.preprocessing.image_size
        if self.chosen.crop_scale is None:
            image = self.preprocessing.cropped(image)
        else:
            box = random_box(image.size, self.chosen.crop_scale, self.config.crop_ratio, rng)
            image = image.resize((size, size), Resampling.BICUBIC, box)
        if self.chosen.flip and rng.random() < 0.5:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        if self.config.shift or self.config.rotate:
            image = self._moved(image, rng)
        return rand_augment(image, self.chosen.layers, self.chosen.magnitude, rng)

    def _moved(self, image: Image.Image, rng: Random) -> Image.Image:
        """Whole pixels to any side, turned about where the middle has come to."""
        from PIL.Image import Resampling

        most = self.config.shift
        degrees = between(-self.config.rotate, self.config.rotate, rng)
        offset = (below(2 * most + 1, rng) - most, below(2 * most + 1, rng) - most)
        return image.rotate(degrees, Resampling.BILINEAR, translate=offset)


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: Random
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop, as torchvision's RandomResizedCrop has them.

    Its area is `scale` of the image's, drawn evenly, its width to its height `ratio`, drawn evenly
    of the logarithm. Where ten such do not lie in the image: the largest in its middle within
    `ratio`.
    """
    width, height = size
    for _ in range(_ATTEMPTS):
        area = width * height * between(*scale, rng)
        aspect = math.exp(between(math.log(ratio[0]), math.log(ratio[1]), rng))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = below(width - w + 1, rng), below(height - h + 1, rng)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
