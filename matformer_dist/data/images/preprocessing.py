"""An image becomes what a model takes, without chance: validation, inference and exports.

By Pillow alone, so that no run sees other pixels because another package is installed.
torchvision's transforms of PIL images call Pillow too: its Resize and CenterCrop give these pixels,
but for what Pillow rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from matformer_dist.config_images import ImageDataConfig
from matformer_dist.data.images.decoding import MODES, BrokenImageError, in_channels
from matformer_dist.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATION = "bicubic"
_MEAN = {1: (0.5,), 3: (0.485, 0.456, 0.406)}  # of ImageNet, for 3 channels
_STD = {1: (0.5,), 3: (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side to image_size / crop_pct pixels, a square of image_size from the middle,
    values from 0 to 1, then (value - mean) / std of each channel.
    """

    image_size: int  # pixels, height and width
    channels: int  # 1 grey, 3 RGB
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            raise UserError(f"images have 1 channel (grey) or 3 (RGB), not {self.channels}")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UserError(
                    f"data.{key} has {len(values)} values, {list(values)}, and the model's images "
                    f"have {self.channels} channels; give one a channel"
                )

    @classmethod
    def of(cls, config: ImageDataConfig, image_size: int, channels: int) -> Preprocessing:
        """UserError where settings and model do not fit each other."""
        mean = _MEAN.get(channels, ()) if config.mean is None else config.mean
        std = _STD.get(channels, ()) if config.std is None else config.std
        return cls(image_size, channels, tuple(mean), tuple(std), config.crop_pct)

    def __call__(self, image: Image.Image) -> Tensor:
        """fp32 [C, image_size, image_size]; UserError for an image whose values have no scale."""
        try:
            image = in_channels(image, self.channels)
        except BrokenImageError as error:
            raise UserError(f"cannot use an image of mode {image.mode}: {error}") from None
        return self.normalized(self.cropped(image))

    def cropped(self, image: Image.Image) -> Image.Image:
        """The square from the middle, resized to image_size.

        In one step: of an image of 1 x 10,000 pixels, the whole would be resized to millions.
        """
        from PIL.Image import Resampling

        width, height = image.size
        shorter = math.floor(self.image_size / self.crop_pct)
        scaled_width = shorter if width <= height else int(shorter * width / height)
        scaled_height = shorter if height <= width else int(shorter * height / width)
        left = round((scaled_width - self.image_size) / 2)
        top = round((scaled_height - self.image_size) / 2)
        box = (
            left * width / scaled_width,
            top * height / scaled_height,
            min(width, (left + self.image_size) * width / scaled_width),
            min(height, (top + self.image_size) * height / scaled_height),
        )
        return image.resize((self.image_size, self.image_size), Resampling.BICUBIC, box)

    def normalized(self, image: Image.Image) -> Tensor:
        """fp32 [C, H, W] of an image of H x W pixels in mode L or RGB."""
        pixels = np.array(image, np.float32).reshape(image.height, image.width, self.channels)
        values = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().div_(255)
        mean, std = (torch.tensor(of).view(-1, 1, 1) for of in (self.mean, self.std))
        return values.sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """What exports tell of it: transformers and timm have the same words."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "interpolation": INTERPOLATION,
        }
