"""Parameters and FLOPs of any submodel, by formula (paper table T4, sec. E.1). No torch here.

FLOPs count a multiply-add as two, matrix products only, attention over the full square of
positions (the convention of the usual model-FLOPs-utilisation figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Segment, Submodel


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


def holds_tokens(vocab_size: int, ranks: int) -> bool:
    """Whether each tensor-parallel rank has a token of a vocabulary that is cut in equal shares."""
    return -(-vocab_size // ranks) * (ranks - 1) < vocab_size


def check_vocabulary(vocab_size: int, ranks: int) -> None:
    """UserError where some of the tensor-parallel ranks have no token."""
    if not holds_tokens(vocab_size, ranks):
        raise UserError(
            f"a vocabulary of {vocab_size} leaves the last of {ranks} tensor-parallel ranks "
            "without a token; use a larger vocabulary or a smaller parallel.tensor"
        )


def ffn_matrices(model: ModelConfig) -> int:
    """Weights of size d_model that one neuron owns: gate, up and down, or up and down."""
    return 3 if model.ffn == "swiglu" else 2


def attention_weights(model: ModelConfig) -> int:
    """Weights of one attention layer: queries, keys, values and the output projection."""
    kv_width = model.kv_heads * model.head_dim
    return 2 * model.d_model * (model.attention_width + kv_width)


def count_parameters(model: ModelConfig, vocab_size: int, submodel: Submodel) -> ParameterCount:
    norm_size = model.d_model * (2 if model.norm == "layernorm" else 1)
    return ParameterCount(
        attention=model.n_layers * attention_weights(model),
        ffn=ffn_matrices(model) * model.d_model * sum(submodel.widths),
        norms=(2 * model.n_layers + 1) * norm_size,
        embedding=vocab_size * model.d_model,
        head=0 if model.tied_embeddings else vocab_size * model.d_model,
    )


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by part; a training step does three times as many (forward, dX, dW)."""

    attention: int
    ffn: int
    head: int

    @property
    def body(self) -> int:
        return self.attention + self.ffn

    @property
    def total(self) -> int:
        return self.body + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.attention + other.attention,
            self.ffn + other.ffn,
            self.head + other.head,
        )


def forward_flops(
    model: ModelConfig,
    vocab_size: int,
    segments: Sequence[Segment],
    seq_len: int,
    *,
    shared_tokens: bool = False,
) -> Flops:
    """Forward FLOPs of one pass over `segments` of sequences of `seq_len` tokens.

    With `shared_tokens` every segment holds the same sequences, and the first layer's attention
    runs once for all of them (see models/matlm.py).
    """
    sequences = sum(segment.sequences for segment in segments)
    attended = model.n_layers * sequences
    if shared_tokens and segments:
        attended -= sequences - segments[0].sequences
    rows = sequences * seq_len
    projections = 2 * attention_weights(model) * seq_len
    scores = 4 * seq_len * seq_len * model.attention_width
    neurons = sum(s.sequences * seq_len * sum(s.submodel.widths) for s in segments)
    return Flops(
        attention=attended * (projections + scores),
        ffn=2 * ffn_matrices(model) * model.d_model * neurons,
        head=2 * vocab_size * model.d_model * rows,
    )


def flops_per_token(model: ModelConfig, vocab_size: int, submodel: Submodel, seq_len: int) -> int:
    """Forward FLOPs of one token of a sequence of `seq_len` tokens, head included."""
    return forward_flops(model, vocab_size, [Segment(submodel, 1)], seq_len).total // seq_len
