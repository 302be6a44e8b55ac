"""PLACEHOLDER until the images arrive."""

from __future__ import annotations

from matformer_dist.config import ReadingConfig


class ImageDataConfig(ReadingConfig):
    train: str = "digits"
    validation: str | None = None
