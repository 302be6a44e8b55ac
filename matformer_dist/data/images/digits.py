"""scikit-learn's digits: 1,797 written by hand, 8 x 8 pixels of 17 shades, without any network.

Validation has every fifth image of each class, in the order of the data, training the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from matformer_dist.config_images import DIGITS
from matformer_dist.data.images.decoding import in_channels
from matformer_dist.data.images.order import Indices
from matformer_dist.data.images.packages import need_package
from matformer_dist.data.images.source import ImageSource

if TYPE_CHECKING:
    from PIL import Image

Part = Literal["train", "validation"]
_WHITE = 16  # scikit-learn's largest value
_EVERY = 5


class DigitsSource(ImageSource):
    def __init__(self, part: Part) -> None:
        need_package("sklearn.datasets", "scikit-learn", "digits")
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = digits.target.astype(np.int64)
        self.samples = digit_samples(labels, part)
        super().__init__(DIGITS, labels[self.samples], [str(name) for name in digits.target_names])
        self._pixels = np.round(digits.images[self.samples] * (255 / _WHITE)).astype(np.uint8)

    def file(self, sample: int) -> str:  # noqa: ARG002
        return self.path

    def where(self, sample: int) -> str:
        return f"{self.path}, number {self.samples[sample]}"

    def image(self, sample: int, channels: int) -> Image.Image:
        from PIL import Image

        return in_channels(Image.fromarray(self._pixels[sample]), channels)


def digit_samples(labels: Indices, part: Part) -> Indices:
    """Of all labels [samples] those of a part, ascending; shares of classes are nearly kept."""
    rank = np.empty_like(labels)  # of a sample among those of its class
    for label in np.unique(labels):
        own = labels == label
        rank[own] = np.arange(own.sum())
    held = rank % _EVERY == _EVERY - 1
    return np.flatnonzero(held if part == "validation" else ~held)
