"""The `hf` format: what transformers loads without code of ours.

Legend: K key-value heads, G query heads per key-value head, h head size, D d_model, m width.

SwiGLU with RMSNorm is a LlamaForCausalLM, GELU with LayerNorm a Starcoder2ForCausalLM without
linear biases. Both have one FFN width: the narrower layers of a Mix'n'Match submodel are padded
with zero neurons, which add exactly nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.errors import UserError
from matformer_dist.submodels.formats import has_transformers_architecture
from matformer_dist.submodels.parts import Export, Part, Parts, Source, layer_of, transposed_neurons
from matformer_dist.submodels.safetensors_files import SafetensorsFiles
from matformer_dist.submodels.transformers_tokenizer import pad_id, tokenizer_files

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "final_norm.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_INNER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.w_out": "self_attn.o_proj.weight",
}


def transformers_export(source: Source) -> Export:
    """UserError where no architecture of transformers is this model's, or its tokenizer is not."""
    check_architecture(source.language_model)
    widest = max(source.submodel.widths)
    return Export(
        safetensors_of(source, [widest] * len(source.submodel)),
        transformers_files(source, transformers_config(source)),
        padded_width=None if source.submodel.is_uniform else widest,
    )


def check_architecture(model: LanguageModelConfig) -> None:
    """UserError where no architecture of transformers is this model's."""
    if not has_transformers_architecture(model):
        raise UserError(
            f"transformers has no architecture with model.ffn {model.ffn} and model.norm "
            f"{model.norm} at {model.n_heads} heads of {model.head_dim} (it has swiglu with "
            "rmsnorm, and, where the heads together are as wide as the model, gelu with "
            "layernorm); extract with --format native"
        )


def safetensors_of(source: Source, widths: Sequence[int]) -> SafetensorsFiles:
    """The weights, the FFN of layer i filled up to `widths[i]` neurons."""
    parts = transformers_parts(source, widths)
    return SafetensorsFiles(parts, source.torch_dtype, source.shard_bytes)


def transformers_files(source: Source, config: dict[str, Any]) -> dict[str, str | bytes]:
    """What stands beside the weights. A document begins behind the end of another: both ids are
    its.
    """
    eod = source.tokenizer.eod
    generation = {"bos_token_id": eod, "eos_token_id": eod}
    if (pad := pad_id(source.tokenizer)) is not None:
        generation["pad_token_id"] = pad  # not in config.json, where its embedding is not trained
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **tokenizer_files(source.tokenizer, source.language_model.max_seq_len),
    }


def transformers_config(source: Source) -> dict[str, Any]:
    """config.json of the widest layer's width."""
    model, eod = source.language_model, source.tokenizer.eod
    shared = {
        "vocab_size": source.universal.outputs,
        "hidden_size": model.d_model,
        "intermediate_size": max(source.submodel.widths),
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_seq_len,
        **_rope(model),
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "use_cache": True,
        "dtype": str(source.torch_dtype).removeprefix("torch."),
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


def _rope(model: LanguageModelConfig) -> dict[str, Any]:
    """Rotary embeddings, where transformers 5 looks for them, and where readers before it do."""
    scaling = model.rope_scaling
    if scaling is None:
        rope: dict[str, Any] = {"rope_type": "default"}
    else:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return {
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if scaling is not None else None,
    }


def transformers_parts(source: Source, widths: Sequence[int]) -> Parts:
    """transformers' tensors of each of the parent's weights, FFNs filled up to `widths`."""
    parts: dict[str, list[Part]] = {}
    for name, whole in source.universal.whole.items():
        layer = layer_of(name)
        if layer is None:
            parts[name] = [Part(_OUTER[name], tuple(whole.shape), _whole)]
            continue
        _, _, inner = name.split(".", 2)
        made = _layer_parts(source, inner, tuple(whole.shape), layer, widths[layer])
        parts[name] = [part._replace(name=f"model.layers.{layer}.{part.name}") for part in made]
    return parts


def _layer_parts(
    source: Source, inner: str, shape: tuple[int, ...], layer: int, padded: int
) -> Iterator[Part]:
    """The tensors of `inner`, a weight of a layer, by their names in it."""
    model, width = source.language_model, source.submodel.widths[layer]
    D = model.d_model
    if inner == "attention.w_qkv":
        rows = (model.n_heads, model.kv_heads, model.kv_heads)
        for i, (letter, heads) in enumerate(zip("qkv", rows, strict=True)):
            name = f"self_attn.{letter}_proj.weight"
            yield Part(name, (heads * model.head_dim, D), partial(_of_groups, i, model))
    elif inner == "ffn.w_in" and model.ffn == "swiglu":
        for i, name in enumerate(("gate_proj", "up_proj")):
            yield Part(f"mlp.{name}.weight", (padded, D), partial(_of_neurons, width, i, D))
    elif inner == "ffn.w_in":
        yield Part("mlp.c_fc.weight", (padded, D), partial(_of_neurons, width, 0, D))
    elif inner == "ffn.w_out":
        name = "down_proj" if model.ffn == "swiglu" else "c_proj"
        yield Part(f"mlp.{name}.weight", (D, padded), partial(transposed_neurons, width))
    elif inner in _INNER:
        yield Part(_INNER[inner], shape, _whole)
    else:
        norm, _, parameter = inner.partition(".")
        yield Part(f"{_INNER[norm]}.{parameter}", shape, _whole)


def _whole(weight: Tensor) -> Tensor:
    return weight


def _of_groups(which: int, model: LanguageModelConfig, w_qkv: Tensor) -> Tensor:
    """w_qkv [K * (G + 2) * h, D] -> q [K * G * h, D], or k or v [K * h, D]."""
    queries = model.n_heads // model.kv_heads
    groups = w_qkv.view(model.kv_heads, queries + 2, model.head_dim, model.d_model)
    return groups.split([queries, 1, 1], dim=1)[which].flatten(0, 2)


def _of_neurons(width: int, vector: int, D: int, w_in: Tensor) -> Tensor:
    """w_in [F, k * D] -> one input vector [m, D] of each of the first m neurons."""
    return w_in[:width, vector * D : (vector + 1) * D]
