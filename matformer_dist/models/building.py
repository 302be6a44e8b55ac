"""The model that settings describe."""

from __future__ import annotations

from collections.abc import Sequence

from matformer_dist.config import ModelConfig
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.matlm import MatLM
from matformer_dist.models.matvit import MatViT
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import SINGLE, TensorParallel


def build_model(
    model: ModelConfig,
    nestings: Sequence[Nesting],
    outputs: int,
    init: Initializer,
    tensor: TensorParallel = SINGLE,
) -> MatFormer:
    """A rank's part of it; `outputs`: tokens of the vocabulary, or classes."""
    if isinstance(model, VisionModelConfig):
        return MatViT(model, nestings, outputs, init, tensor)
    assert isinstance(model, LanguageModelConfig)
    return MatLM(model, nestings, outputs, init, tensor)
