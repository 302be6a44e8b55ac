"""What a model's outputs mean: tokens of a tokenizer, or named classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from matformer_dist.config import ModelConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.data.tokenizer_files import load_tokenizer


class Labels(Protocol):
    """A Tokenizer, or ClassNames."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """By name, so that a copy stands anywhere."""

    @property
    def source(self) -> str:
        """Where they come from, for messages."""

    @property
    def digest(self) -> str:
        """Equal digests mean equal labels."""


def load_labels(path: str | Path, model: ModelConfig) -> Labels:
    """Of a model, from a directory that holds them, or a file; UserError where they are not."""
    if isinstance(model, VisionModelConfig):
        from matformer_dist.data.images.classes import load_class_names

        return load_class_names(Path(path))
    return load_tokenizer(path)
