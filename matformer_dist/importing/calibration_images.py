"""Images to measure importance on, as a vision encoder's first hidden states.

Legend: n images, C channels, H height and width, s rows of an image, D d_model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matformer_dist.config_images import ImageDataConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.data.images.decoding import BrokenImageError, decode_image
from matformer_dist.data.images.finding import find_images
from matformer_dist.data.images.folder import SUFFIXES
from matformer_dist.data.images.order import spread
from matformer_dist.data.images.packages import need_pillow
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.importing.calibration import Calibration
from matformer_dist.models.patches import PatchEmbedding
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import SINGLE

if TYPE_CHECKING:
    from PIL import Image

_AT_ONCE = 32  # images that are embedded at a time


def read_images(inputs: Sequence[Path], preprocessing: Preprocessing, count: int) -> Tensor:
    """`count` of the inputs' images [n, C, H, H], evenly spread over them, or all there are.

    An input is an image, a folder of images at any depth, or whatever else data.train may be.
    UserError where there are none, or one cannot be read.
    """
    if count < 1:
        raise UserError(f"--calibration-images {count} must be above 0, for example 128")
    need_pillow()
    channels = preprocessing.channels
    found = list(chain.from_iterable(_images(path, channels) for path in inputs))
    return torch.stack([preprocessing(found[i]()) for i in spread(len(found), count)])


def _images(path: Path, channels: int) -> list[Callable[[], Image.Image]]:
    """What reads each of its images; in the order of their paths."""
    files = _files(path)
    if files:
        return [lambda file=file: _read(file, channels) for file in files]  # type: ignore[misc]
    train = find_images(ImageDataConfig(train=str(path), validation=str(path))).train
    return [
        lambda sample=int(sample): train.source.image(sample, channels)  # type: ignore[misc]
        for sample in train.samples
    ]


def _files(path: Path) -> list[Path]:
    """Of images, in a folder or its folders; none where it holds files of many images each."""
    if path.is_file():
        return [path] if path.name.lower().endswith(SUFFIXES) else []
    found = (
        Path(folder, name)
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
    return sorted(found)


def _read(file: Path, channels: int) -> Image.Image:
    try:
        return decode_image(file.read_bytes(), channels)
    except (OSError, BrokenImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read the calibration image {file}: {reason}; mend it, or leave it out"
        ) from None


@torch.no_grad()
def of_images(
    model: VisionModelConfig, images: Tensor, embedding: dict[str, Tensor]
) -> Calibration:
    """images [n, C, H, H]; embedding: a PatchEmbedding's weights."""
    with torch.device("meta"):
        embed = PatchEmbedding(model, Initializer(seed=None), SINGLE)
    embed.load_state_dict(embedding, assign=True)
    hidden = torch.cat([embed(some) for some in images.split(_AT_ONCE)])
    return Calibration(model, hidden.view(len(images), model.rows, -1), None, "images")
