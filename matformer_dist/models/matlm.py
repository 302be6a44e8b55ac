"""MatLM: a nested decoder-only language model, all granularities of a batch in one pass.

Legend: b sequences of tokens, B sequences in flight, s positions, R = B * s rows, D d_model,
V vocabulary, n segments.

Rows are ordered segment by segment. Embedding, attention and norms do not see segments; the
nested FFN does. With `shared_tokens`, every segment holds the same b sequences: they are equal
until the first FFN, so embedding and the first layer's attention run once, on b sequences.

With sequence parallelism a rank holds R/T of the rows between attention, FFN and head (see
parallel/sequence.py); N are those that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matformer_dist.config import ModelConfig
from matformer_dist.counting import check_vocabulary
from matformer_dist.models.attention import Attention
from matformer_dist.models.cache import KeyValueCache, LayerCache
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.nested_feed_forward import NestedFeedForward
from matformer_dist.models.recomputation import Again, made_again
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting, Segment, Submodel
from matformer_dist.ops.multi_granularity_loss import multi_granularity_loss
from matformer_dist.ops.vocab_shard import VocabShard
from matformer_dist.parallel.layers import (
    Initializer,
    VocabParallelEmbedding,
    column_linear,
    copy_to_ranks,
    repeat_over_ranks,
    replicated,
    vocab_shard,
)
from matformer_dist.parallel.layout import ROWS
from matformer_dist.parallel.topology import SINGLE, TensorParallel

IGNORED_TARGET = -100


def _norm(model: ModelConfig, tensor: TensorParallel) -> nn.Module:
    kind = nn.RMSNorm if model.norm == "rmsnorm" else nn.LayerNorm
    return replicated(kind(model.d_model, eps=model.norm_eps), tensor)


class Block(nn.Module):
    def __init__(
        self,
        name: str,
        model: ModelConfig,
        nesting: Nesting,
        init: Initializer,
        tensor: TensorParallel,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.attention_norm = _norm(model, tensor)
        self.attention = Attention(f"{name}.attention", model, init, tensor)
        self.ffn_norm = _norm(model, tensor)
        self.ffn = NestedFeedForward(f"{name}.ffn", model, nesting, init, tensor)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        rows: Sequence[int],
        widths: Sequence[int],
        repeat: int = 1,
        cache: LayerCache | None = None,
        selective: bool = False,
    ) -> Tensor:
        """x [N, D] -> [repeat * N, D]; rows are repeated between attention and FFN.

        selective: norms and rotations are made again in the backward pass, and not kept.
        """
        attention = partial(self.attention, rotation=rotation, cache=cache, selective=selective)
        x = x + _behind(self.attention_norm, attention, x, selective)
        x = repeat_over_ranks(x, repeat, self.tensor) if repeat > 1 else x
        ffn = partial(self.ffn, rows=rows, widths=widths)
        return x + _behind(self.ffn_norm, ffn, x, selective)

    def compile_parts(self) -> None:
        """torch.compile where `selective` leaves it nothing to keep (see recomputation.py)."""
        for norm in (self.attention_norm, self.ffn_norm):
            norm.compile()
        self.attention.turned = torch.compile(self.attention.turned)


def _behind(
    norm: nn.Module, sublayer: Callable[[Tensor], Tensor], x: Tensor, selective: bool
) -> Tensor:
    """sublayer(norm(x)); selective: of the norm, x alone is kept."""
    if not selective:
        return sublayer(norm(x))
    normed = checkpoint(norm, x, use_reentrant=False, preserve_rng_state=False)
    with made_again(Again(normed, partial(norm, x.detach()))):
        return sublayer(normed)


class Head(nn.Module):
    """The output projection and the losses over it, vocabulary cut over T ranks.

    | operand | whole  | local                     |                                          |
    |---------|--------|---------------------------|------------------------------------------|
    | weight  | [V, D] | [ceil(V/T), D]            | rows, the last rank's padded             |
    | hidden  | [R, D] | the whole                 | backward: all-reduces its gradient       |
    |         |        | or cut rows, [R/T, D]     | gathered; backward: reduce-scatters it   |
    | logits  | [R, V] | a chunk's [c, ceil(V/T)]  | forward: an all-gather for each half of  |
    |         |        |                           | a chunk, of a few numbers a row          |

    Where embeddings are tied, it works on the embedding's weight, which the caller passes in.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        init: Initializer,
        tensor: TensorParallel,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        first, size = vocab_shard(vocab_size, tensor)
        check_vocabulary(vocab_size, tensor.size)  # of all ranks, so that all stop
        gather = tensor.start_gather if tensor.size > 1 else None
        self.shard = VocabShard(offset=first, size=size, gather=gather)
        self.vocab_size = vocab_size
        if model.tied_embeddings:
            self.register_parameter("weight", None)
        else:
            self.weight = init.parameter(
                "head.weight", (vocab_size, model.d_model), model.init_std, ROWS, tensor
            )

    def forward(
        self, hidden: Tensor, tied: Tensor | None, targets: Tensor, plan: Pass
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, D], targets [b, s] -> total loss and statistics [B, 5]; see MatLM.forward."""
        weight = self.weight if tied is None else tied
        s = targets.shape[1]
        rows = [segment.sequences * s for segment in plan.segments]
        flat = targets.flatten()
        valid = (flat != IGNORED_TARGET).sum().clamp(min=1)
        if plan.shared_tokens:
            flat = flat.repeat(len(rows))
        out = multi_granularity_loss(
            copy_to_ranks(hidden, self.tensor),
            weight,
            flat,
            rows=rows,
            ce_weights=plan.ce_weights,
            z_weights=plan.z_weights,
            kl_weights=plan.kl_weights,
            scale=valid.reciprocal().to(torch.float32),
            temperature=plan.temperature,
            shared_tokens=plan.shared_tokens,
            ignore_index=IGNORED_TARGET,
            vocab=self.shard,
        )
        counted = (flat != IGNORED_TARGET).to(out.nll.dtype)
        agrees = correct = torch.zeros_like(counted)
        if out.best is not None:
            best = out.best.view(len(rows), rows[0])
            agrees = counted * (best == best[:1]).flatten()
            correct = counted * (out.best == flat)
        columns = torch.stack([out.nll, agrees, out.kl, counted, correct], dim=1)
        return out.total, columns.view(-1, s, 5).sum(dim=1)

    def logits(self, hidden: Tensor, tied: Tensor | None) -> Tensor:
        """hidden [N, D] -> logits [R, V] of all rows and the whole vocabulary, on every rank."""
        weight = self.weight if tied is None else tied
        local = column_linear(hidden, weight, self.tensor)
        if self.tensor.size == 1:
            return local
        shards = self.tensor.gather(local)  # [T, R, V/T]
        return shards.transpose(0, 1).flatten(1)[:, : self.vocab_size]


class MatLM(nn.Module):
    """A nested language model, or any submodel taken out of one.

    `nestings` has one entry a layer: all equal for a universal model; an extracted submodel has
    the granularities up to its own in each layer, so it is nested still.
    """

    def __init__(
        self,
        model: ModelConfig,
        nestings: Sequence[Nesting],
        vocab_size: int,
        init: Initializer,
        tensor: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        assert len(nestings) == model.n_layers
        self.model = model
        self.vocab_size = vocab_size
        self.tensor = tensor
        self.activation_checkpointing: Literal["none", "selective", "full"] = "none"
        self.embedding = VocabParallelEmbedding(
            "embedding", vocab_size, model.d_model, model.init_std, init, tensor
        )
        self.layers = nn.ModuleList(
            Block(f"layers.{i}", model, nesting, init, tensor) for i, nesting in enumerate(nestings)
        )
        self.final_norm = _norm(model, tensor)
        self.head = Head(model, vocab_size, init, tensor)

    def compile_layers(self) -> None:
        """By torch.compile, as `activation_checkpointing` lets it."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            if self.activation_checkpointing == "selective":
                layer.compile_parts()
            else:
                layer.compile()

    @property
    def tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.model.tied_embeddings else None

    def hidden(
        self,
        tokens: Tensor,
        segments: Sequence[Segment],
        shared_tokens: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens [b, s] -> final hidden rows [N, D], segment by segment.

        With a cache, tokens follow what it holds of each sequence, and it holds them afterwards.
        """
        s = tokens.shape[1]
        if cache is None:
            rotation = Rotation.of(torch.arange(s, device=tokens.device), self.model)
        else:
            span = cache.begin(s)
            rotation = cache.rotation.at(span.positions)
        rows = [segment.sequences * s for segment in segments]
        x = self.embedding(tokens.flatten())
        again = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        for i, layer in enumerate(self.layers):
            widths = [segment.submodel.widths[i] for segment in segments]
            repeat = len(segments) if shared_tokens and i == 0 else 1
            arguments = (
                rotation,
                rows,
                widths,
                repeat,
                cache.layer(i, span) if cache is not None else None,
                again == "selective",
            )
            if again == "full":
                x = checkpoint(layer, x, *arguments, use_reentrant=False)
            else:
                x = layer(x, *arguments)
        if cache is not None:
            cache.end(s)
        return self.final_norm(x)

    def forward(self, tokens: Tensor, targets: Tensor, plan: Pass) -> tuple[Tensor, Tensor]:
        """One pass over all segments.

        tokens, targets [b, s]; b is the sum of the segments' sequences, or, with shared tokens,
        each segment's own. Returns the total loss (0-d) and, per sequence, segment by segment, sums
        over its tokens [B, 5]: negative log-likelihood in nats, agreements with the first segment's
        top-1, KL from the first segment in nats, the number of tokens, and those whose top-1 is the
        target. Without shared tokens nobody looks for the top-1: agreements and the last are 0.
        """
        hidden = self.hidden(tokens, plan.segments, plan.shared_tokens)
        return self.head(hidden, self.tied_weight, targets, plan)

    def logits(
        self,
        tokens: Tensor,
        submodel: Submodel,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens [b, s] -> next-token logits [b, s, V] of one submodel."""
        hidden = self.hidden(tokens, [Segment(submodel, tokens.shape[0])], cache=cache)
        return self.head.logits(hidden, self.tied_weight).view(*tokens.shape, -1)

    def new_cache(self, sequences: int, capacity: int) -> KeyValueCache:
        """An empty key-value cache for `capacity` positions of `sequences`."""
        weight = self.embedding.weight
        kv_heads = self.model.kv_heads // self.tensor.size
        shape = (sequences, kv_heads, capacity, self.model.head_dim)
        # Zeros: whatever else lay there, not-a-numbers too, would be weighed by the mask's 0.
        keys, values = ([weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        rotation = Rotation.of(torch.arange(capacity, device=weight.device), self.model)
        return KeyValueCache(keys, values, [0] * sequences, rotation)
