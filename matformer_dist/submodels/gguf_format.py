"""The `gguf` format: what llama.cpp loads, at exact widths.

Legend: h head size, D d_model.

A uniform submodel is of architecture `llama`. Mix'n'Match submodels are of `deci`, the one of
llama.cpp's Llama architectures that reads a width per layer (src/models/deci.cpp). Both turn
neighbouring rows of a head against each other (LLAMA_ROPE_TYPE_NORM), where ours and transformers'
turn the halves: rows of queries and keys are interleaved.

llama.cpp tokenizes like us, but for what SentencePiece's own text form cannot tell apart: a literal
U+2581 is a space to it, and "</s>" in a text is the end of a document where the vocabulary has
pieces that merge to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.submodels.formats import has_llama_architecture
from matformer_dist.submodels.gguf_files import GgufFile, gguf_package
from matformer_dist.submodels.parts import Export, Parts, Source
from matformer_dist.submodels.transformers_format import transformers_parts
from matformer_dist.submodels.transformers_tokenizer import exact_pieces


def gguf_export(source: Source) -> Export:
    """UserError where llama.cpp has no such model or tokenizer."""
    model = source.universal.model
    if not has_llama_architecture(model):
        raise UserError(
            f"format gguf holds swiglu with rmsnorm, the model has {model.ffn} with {model.norm}; "
            "extract with --format native"
        )
    architecture = "llama" if source.submodel.is_uniform else "deci"
    pieces = exact_pieces(source.tokenizer, "llama.cpp")

    def describe(writer: Any) -> None:
        _describe_model(writer, source)
        _describe_tokenizer(writer, source, pieces)

    parts = _parts(source, architecture)
    weights = GgufFile(parts, source.dtype, architecture, describe)
    return Export(weights, {"tokenizer.model": source.tokenizer.model})


def _parts(source: Source, architecture: str) -> Parts:
    """transformers' tensors under the names of llama.cpp, queries and keys interleaved."""
    gguf, model = gguf_package(), source.universal.model
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


def _describe_model(writer: Any, source: Source) -> None:
    model, widths = source.universal.model, source.submodel.widths
    per_layer = not source.submodel.is_uniform
    layers = model.n_layers
    writer.add_type("model")
    writer.add_name(f"MatFormer {source.submodel}")
    writer.add_vocab_size(source.universal.vocab_size)
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
    writer.add_layer_norm_rms_eps(model.norm_eps)


def _describe_tokenizer(writer: Any, source: Source, pieces: Any) -> None:
    """A document begins behind the end of another, and nothing is put before a text."""
    eod = source.tokenizer.eod
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in pieces.pieces])
    writer.add_token_scores([piece.score for piece in pieces.pieces])
    writer.add_token_types([piece.type for piece in pieces.pieces])  # numbered as SentencePiece's
    writer.add_bos_token_id(eod)
    writer.add_eos_token_id(eod)
    writer.add_unk_token_id(pieces.trainer_spec.unk_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(pieces.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(False)
