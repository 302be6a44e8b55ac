"""The `hf` format: what transformers loads without code of ours.

Legend: K key-value heads, G query heads per key-value head, h head size, D d_model, m width.

SwiGLU with RMSNorm is a LlamaForCausalLM, GELU with LayerNorm a Starcoder2ForCausalLM without
linear biases. Both have one FFN width: the narrower layers of a Mix'n'Match submodel are padded
with zero neurons, which add exactly nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.checkpoints.universal import UniversalModel
from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.formats import has_transformers_architecture

_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def check_architecture(model: ModelConfig) -> None:
    """UserError where no architecture of transformers is this model's."""
    if not has_transformers_architecture(model):
        raise UserError(
            f"transformers has no architecture with model.ffn {model.ffn} and model.norm "
            f"{model.norm} (it has swiglu with rmsnorm, and gelu with layernorm); extract with "
            "--format native"
        )


def transformers_config(
    universal: UniversalModel, submodel: Submodel, eod: int, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json. A document begins behind the end of another: both ids are `eod`."""
    model = universal.model
    check_architecture(model)
    shared = {
        "vocab_size": universal.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": max(submodel.widths),
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,  # where readers older than transformers 5 look
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if model.ffn == "swiglu":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **shared,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
        }
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        **shared,
        "hidden_act": "gelu",
        "norm_epsilon": model.norm_eps,
        "use_bias": False,
        "sliding_window": None,
    }


def transformers_weights(
    universal: UniversalModel, submodel: Submodel
) -> Iterator[tuple[str, Tensor]]:
    """transformers' parameters of the submodel, one at a time."""
    model = universal.model
    check_architecture(model)
    yield "model.embed_tokens.weight", universal.weight("embedding.weight")
    parameters = ["weight", "bias"] if model.norm == "layernorm" else ["weight"]
    for i, width in enumerate(submodel.widths):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for norm, name in _NORMS.items():
            for parameter in parameters:
                weight = universal.weight(f"{ours}.{norm}.{parameter}")
                yield f"{theirs}.{name}.{parameter}", weight
        qkv = universal.weight(f"{ours}.attention.w_qkv")
        for letter, weight in zip("qkv", _ungroup(qkv, model), strict=True):
            yield f"{theirs}.self_attn.{letter}_proj.weight", weight
        yield f"{theirs}.self_attn.o_proj.weight", universal.weight(f"{ours}.attention.w_out")
        missing = max(submodel.widths) - width
        w_in = F.pad(universal.weight(f"{ours}.ffn.w_in")[:width], (0, 0, 0, missing))
        w_out = F.pad(universal.weight(f"{ours}.ffn.w_out")[:width], (0, 0, 0, missing))
        if model.ffn == "swiglu":
            gate, up = w_in.chunk(2, dim=1)
            yield f"{theirs}.mlp.gate_proj.weight", gate
            yield f"{theirs}.mlp.up_proj.weight", up
            yield f"{theirs}.mlp.down_proj.weight", w_out.T
        else:
            yield f"{theirs}.mlp.c_fc.weight", w_in
            yield f"{theirs}.mlp.c_proj.weight", w_out.T
    for parameter in parameters:
        yield f"model.norm.{parameter}", universal.weight(f"final_norm.{parameter}")
    if not model.tied_embeddings:
        yield "lm_head.weight", universal.weight("head.weight")


def _ungroup(w_qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """w_qkv [K * (G + 2) * h, D] -> q [K * G * h, D], k and v [K * h, D]."""
    queries = model.n_heads // model.kv_heads
    groups = w_qkv.view(model.kv_heads, queries + 2, model.head_dim, model.d_model)
    q, k, v = groups.split([queries, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
