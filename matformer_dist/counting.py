"""Parameters and FLOPs of any submodel, by formula (paper table T4, sec. E.1). No torch here.

FLOPs count a multiply-add as two, matrix products only, attention over the full square of
positions (the convention of the usual model-FLOPs-utilisation figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matformer_dist.config import ModelConfig, Sample
from matformer_dist.errors import UserError
from matformer_dist.nesting import Segment, Submodel

# A head's bias is a column of its weight, filled up with zeros to the 16 bytes that tensor cores
# want operands aligned to (models/head.py); not counted as work or weights.
HEAD_BIAS_COLUMNS = 8


@dataclass(frozen=True)
class ParameterCount:
    attention: int
    ffn: int
    norms: int
    embedding: int
    head: int  # 0 where tied to the embedding

    @property
    def non_embedding(self) -> int:
        return self.attention + self.ffn + self.norms

    @property
    def total(self) -> int:
        return self.non_embedding + self.embedding + self.head


def holds_outputs(outputs: int, ranks: int) -> bool:
    """Whether each tensor-parallel rank has a token, or class, where all have equal shares."""
    return -(-outputs // ranks) * (ranks - 1) < outputs


def check_outputs(outputs: int, ranks: int) -> None:
    """UserError where some of the tensor-parallel ranks have no token, or class."""
    if not holds_outputs(outputs, ranks):
        raise UserError(
            f"{outputs} tokens or classes leave the last of {ranks} tensor-parallel ranks without "
            "one; use a larger vocabulary, or a smaller parallel.tensor"
        )


def ffn_matrices(model: ModelConfig) -> int:
    """Weights of size d_model that one neuron owns: gate, up and down, or up and down."""
    return 3 if model.ffn == "swiglu" else 2


def attention_weights(model: ModelConfig) -> int:
    """Weights of one attention layer: queries, keys, values and the output projection."""
    kv_width = model.kv_heads * model.head_dim
    return 2 * model.d_model * (model.attention_width + kv_width)


def attention_biases(model: ModelConfig) -> int:
    if not model.biases:
        return 0
    return model.attention_width + 2 * model.kv_heads * model.head_dim + model.d_model


def ffn_parameters(model: ModelConfig, width: int) -> int:
    """Of one layer at `width` neurons."""
    matrices = ffn_matrices(model)
    biases = (matrices - 1) * width + model.d_model if model.biases else 0
    return matrices * model.d_model * width + biases


def count_parameters(model: ModelConfig, outputs: int, submodel: Submodel) -> ParameterCount:
    """`outputs`: tokens of the vocabulary, or classes."""
    norm_size = model.d_model * (2 if model.norm == "layernorm" else 1)
    return ParameterCount(
        attention=model.n_layers * (attention_weights(model) + attention_biases(model)),
        ffn=sum(ffn_parameters(model, width) for width in submodel.widths),
        norms=(2 * model.n_layers + 1) * norm_size,
        embedding=model.embedding_parameters(outputs),
        head=model.head_parameters(outputs),
    )


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by part; a training step does three times as many (forward, dX, dW)."""

    attention: int
    ffn: int
    head: int
    embedding: int = 0  # of an image's patches; a language model looks its tokens up

    @property
    def body(self) -> int:
        return self.attention + self.ffn

    @property
    def total(self) -> int:
        return self.embedding + self.body + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.attention + other.attention,
            self.ffn + other.ffn,
            self.head + other.head,
            self.embedding + other.embedding,
        )


def forward_flops(
    model: ModelConfig,
    outputs: int,
    segments: Sequence[Segment],
    sample: Sample,
    *,
    shared_tokens: bool = False,
) -> Flops:
    """Forward FLOPs of one pass over `segments` of samples, for so many tokens or classes.

    With `shared_tokens` every segment holds the same samples, and the embedding and the first
    layer's attention run once for all of them (see models/matformer.py).
    """
    sequences = sum(segment.sequences for segment in segments)
    distinct = segments[0].sequences if shared_tokens and segments else sequences
    attended = (model.n_layers - 1) * sequences + distinct
    s = sample.positions
    projections = 2 * attention_weights(model) * s
    scores = 4 * s * s * model.attention_width
    neurons = sum(of.sequences * s * sum(of.submodel.widths) for of in segments)
    return Flops(
        attention=attended * (projections + scores),
        ffn=2 * ffn_matrices(model) * model.d_model * neurons,
        head=2 * outputs * model.d_model * sequences * sample.predictions,
        embedding=distinct * model.embedding_flops,
    )


def flops_per_unit(model: ModelConfig, outputs: int, submodel: Submodel, sample: Sample) -> int:
    """Forward FLOPs of one token of a sequence, head included; or of one image."""
    flops = forward_flops(model, outputs, [Segment(submodel, 1)], sample).total
    return flops // sample.predictions
