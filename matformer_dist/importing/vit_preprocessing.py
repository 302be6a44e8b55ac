"""preprocessor_config.json of transformers: how images are prepared, as a run's settings say it.

A run resizes the shorter side, bicubic, and cuts a square from the middle; where the file says
something else, as those of most ViTs, a notice tells.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matformer_dist.errors import UserError
from matformer_dist.importing.checkpoint_config import short

_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers; the first is ViTImageProcessor's default


def read_preprocessing(
    directory: Path, image_size: int, channels: int
) -> tuple[dict[str, Any], list[str]]:
    """Keys of a run's section `data`, and notices; UserError where the file is damaged."""
    path = directory / "preprocessor_config.json"
    if not path.exists():
        half = [0.5] * channels
        notice = (
            f"{directory} has no {path.name}: data.mean and data.std of the run are 0.5, as "
            "transformers' ViTImageProcessor has them; set them to what the model was trained with"
        )
        return {"mean": half, "std": half}, [notice]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        images, notices = _mean_and_std(config, channels), []
        images["crop_pct"], fits = _crop(config, image_size)
        if not fits:
            notices.append(
                f"{path.name} prepares images otherwise (size {short(config.get('size'))}): the "
                f"run resizes the shorter side, and cuts a square of {image_size} pixels from the "
                "middle"
            )
        if config.get("resample", _BILINEAR) != _BICUBIC:
            notices.append(f"{path.name} does not resize bicubic, as the run does")
        return images, notices
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}); mend it, or take it away: then "
            "set data.mean and data.std of the run"
        ) from None


def _mean_and_std(config: dict[str, Any], channels: int) -> dict[str, Any]:
    """For values from 0 to 1, of (value * 255 * rescale_factor - mean) / std."""
    mean, std = (
        [float(value) for value in _each(config.get(key, 0.5), channels)]
        for key in ("image_mean", "image_std")
    )
    if not config.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    scale = 255 * (config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1)
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}


def _each(value: Any, channels: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * channels


def _crop(config: dict[str, Any], image_size: int) -> tuple[float, bool]:
    """data.crop_pct, and whether ours then cut out the same square."""
    size = config.get("size", 224)
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    if shorter is None or not config.get("do_center_crop", False):
        return 1.0, False
    crop = config.get("crop_size", image_size)
    height, width = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    if not height == width == image_size <= shorter:
        return 1.0, False
    share = image_size / shorter
    if math.floor(image_size / share) != shorter:  # a quotient may come out just below
        share = image_size / (shorter + 0.5)
    return share, True
