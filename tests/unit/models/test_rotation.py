"""Rotary embeddings against transformers', of which imports and exports are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.models.rotation import Rotation

SHAPE = {"d_model": 256, "n_layers": 1, "n_heads": 4, "d_ff": 64, "rope_theta": 500000.0}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, {"rope_type": "default"}),
        ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"kind": "llama3", "original_max_seq_len": 8192, **LLAMA3},
            {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3},
        ),
    ],
    ids=["default", "linear", "llama3"],
)
def test_rotations_are_bit_for_bit_transformers(
    ours: dict[str, Any] | None, theirs: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = LanguageModelConfig.model_validate(
        {**SHAPE, "max_seq_len": 131072, "rope_scaling": ours}
    )
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={**theirs, "rope_theta": 500000.0},
    )  # fmt: skip
    positions = torch.arange(0, 131072, 101)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    rotation = Rotation.of(positions, model)
    assert rotation.cos.equal(cos[0]) and rotation.sin.equal(sin[0])


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"kind": "llama3", "factor": 8.0}, "of kind llama3 needs original_max_seq_len"),
        ({"kind": "linear", "factor": 0.5}, "greater than or equal to 1"),
        ({"kind": "yarn", "factor": 2.0}, "'linear' or 'llama3'"),
        (
            {"kind": "llama3", "factor": 8, "original_max_seq_len": 9, "low_freq_factor": 4},
            "low_freq_factor 4 must be below high_freq_factor, which is 4",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LanguageModelConfig.model_validate({**SHAPE, "rope_scaling": scaling})
