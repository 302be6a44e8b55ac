"""The `gguf` format: what llama.cpp loads, at exact widths.

Legend: h head size, D d_model.

A uniform submodel is of architecture `llama`. Mix'n'Match submodels are of `deci`, the one of
llama.cpp's Llama architectures that reads a width per layer (src/models/deci.cpp). Both turn
neighbouring rows of a head against each other (LLAMA_ROPE_TYPE_NORM), where ours and transformers'
turn the halves: rows of queries and keys are interleaved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.rotation import frequencies
from matformer_dist.submodels.formats import has_llama_architecture
from matformer_dist.submodels.gguf_files import GgufFile, gguf_package
from matformer_dist.submodels.gguf_tokenizer import gguf_tokenizer
from matformer_dist.submodels.parts import Export, Parts, Source
from matformer_dist.submodels.transformers_format import transformers_parts


def gguf_export(source: Source) -> Export:
    """UserError where llama.cpp has no such model or tokenizer."""
    model = source.language_model
    if not has_llama_architecture(model):
        raise UserError(
            f"format gguf holds swiglu with rmsnorm, the model has {model.ffn} with {model.norm}; "
            "extract with --format native"
        )
    architecture = "llama" if source.submodel.is_uniform else "deci"
    describe_tokenizer = gguf_tokenizer(source.tokenizer)

    def describe(writer: Any) -> None:
        _describe_model(writer, source)
        describe_tokenizer(writer)

    parts = _parts(source, architecture)
    weights = GgufFile(parts, source.dtype, architecture, describe, _slowed_rotation(model))
    return Export(weights, source.tokenizer.files)


def _parts(source: Source, architecture: str) -> Parts:
    """transformers' tensors under the names of llama.cpp, queries and keys interleaved."""
    gguf, model = gguf_package(), source.language_model
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), model.n_layers)
    parts = {}
    for weight, theirs in transformers_parts(source, source.submodel.widths).items():
        parts[weight] = [
            part._replace(
                name=names.get_name(part.name, try_suffixes=(".weight",)),
                cut=partial(_interleaved, part.cut, model.head_dim)
                if part.name.endswith(("q_proj.weight", "k_proj.weight"))
                else part.cut,
            )
            for part in theirs
        ]
    return parts


def _interleaved(cut: Any, h: int, weight: Tensor) -> Tensor:
    """[heads * h, D], the halves of each head's rows interleaved."""
    rows = cut(weight)
    return rows.reshape(-1, 2, h // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _slowed_rotation(model: LanguageModelConfig) -> dict[str, NDArray[Any]]:
    """By what llama.cpp divides each frequency, [h / 2], where that is not the same for all."""
    if model.rope_scaling is None or model.rope_scaling.kind == "linear":
        return {}
    plain = frequencies(model.model_copy(update={"rope_scaling": None}))
    return {"rope_freqs.weight": (plain / frequencies(model)).numpy()}


def _describe_model(writer: Any, source: Source) -> None:
    model, widths = source.language_model, source.submodel.widths
    per_layer = not source.submodel.is_uniform
    layers = model.n_layers
    writer.add_type("model")
    writer.add_name(f"MatFormer {source.submodel}")
    writer.add_vocab_size(source.universal.outputs)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(list(widths) if per_layer else widths[0])
    writer.add_head_count([model.n_heads] * layers if per_layer else model.n_heads)
    writer.add_head_count_kv([model.kv_heads] * layers if per_layer else model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    if model.rope_scaling is not None and model.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_scaling.factor)
    writer.add_layer_norm_rms_eps(model.norm_eps)
