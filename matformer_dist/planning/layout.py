"""A run as planning sees it: configuration, vocabulary, ranks; the weights and rows of one rank.

Legend: b sequences of a micro-batch, s positions, R rows (tokens of all segments), D d_model,
F d_ff, V vocabulary, T tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from matformer_dist.chunks import default_chunk_tokens, even_chunk_tokens
from matformer_dist.config import Config
from matformer_dist.counting import (
    Flops,
    attention_weights,
    ffn_matrices,
    forward_flops,
)
from matformer_dist.nesting import Segment


def reduce_bucket(parameters: int) -> int:
    """Elements of DeepSpeed's buffer for gradients of a rank's weights: its default, or all."""
    return min(500_000_000, parameters)


class Module(NamedTuple):
    """Weights that are used together: their elements by name."""

    kind: Literal["embedding", "norm", "attention", "ffn", "head"]
    weights: dict[str, int]


@dataclass(frozen=True)
class PlannedRun:
    """`data_size` data-parallel ranks, each of config.parallel.tensor devices of a kind."""

    config: Config
    vocab_size: int
    data_size: int = 1
    device: str = "cuda"  # or cpu

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor

    @property
    def world_size(self) -> int:
        return self.tensor * self.data_size

    @property
    def micro_batches(self) -> int:
        """Of each rank, a step."""
        return self.config.training.micro_batches(self.data_size)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.training.seq_len

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return 2 if self.config.training.precision == "bf16" else 4

    # Weights

    @property
    def local_vocab(self) -> int:
        """Rows of this rank's share of a vocabulary table, padding included."""
        return -(-self.vocab_size // self.tensor)

    @cached_property
    def modules(self) -> list[Module]:
        """Of one rank, as the forward pass meets them: embedding; norm, attention, norm and FFN of
        each layer; norm; head, empty where tied.
        """
        model, tensor = self.config.model, self.tensor
        norms = 2 if model.norm == "layernorm" else 1
        out = model.d_model * model.attention_width // tensor
        qkv = attention_weights(model) // tensor - out
        neurons = model.d_ff // tensor * model.d_model
        table = self.local_vocab * model.d_model

        def norm(name: str) -> Module:
            return Module("norm", {f"{name} {k}": model.d_model for k in range(norms)})

        w_in = (ffn_matrices(model) - 1) * neurons
        found = [Module("embedding", {"embedding": table})]
        for i in range(model.n_layers):
            found += [
                norm(f"{i} attention norm"),
                Module("attention", {f"{i} w_qkv": qkv, f"{i} w_out": out}),
                norm(f"{i} ffn norm"),
                Module("ffn", {f"{i} w_in": w_in, f"{i} w_down": neurons}),
            ]
        head = {} if model.tied_embeddings else {"head": table}
        return [*found, norm("norm"), Module("head", head)]

    @cached_property
    def matrices(self) -> dict[str, int]:
        """Elements of one rank's matrices; those of layers once for each of their kinds."""
        return {kind: self._elements(kind) for kind in ("attention", "ffn", "embedding", "head")}

    @cached_property
    def norms(self) -> int:
        """Elements of all norms, which every rank has whole."""
        return self._elements("norm")

    def _elements(self, kind: str) -> int:
        return sum(sum(module.weights.values()) for module in self.modules if module.kind == kind)

    @property
    def parameters(self) -> int:
        """Elements of one rank's weights, before ZeRO cuts them."""
        return sum(self.matrices.values()) + self.norms

    @property
    def compiles_blocks(self) -> bool:
        """Whole ones, for which the compiler chooses what is kept; with selective checkpointing
        it has norms and rotations alone.
        """
        training = self.config.training
        return training.compile and training.activation_checkpointing != "selective"

    @property
    def sums_in_fp32(self) -> bool:
        """Whether DeepSpeed's bf16 optimizer is at work: gradients go into whole fp32 sums."""
        bf16 = self.config.training.precision == "bf16"
        return bf16 and self.config.zero_stage == 1 and not self.config.offloads("optimizer")

    @property
    def bucket_elements(self) -> int:
        """Of the gradients that DeepSpeed sends at once; it keeps a buffer of that size."""
        given = self.config.zero_optimization.get("reduce_bucket_size")
        return reduce_bucket(self.parameters) if given is None else int(given)

    # Rows

    @property
    def shared_tokens(self) -> bool:
        return self.config.objective.kind in ("joint", "sandwich")

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(sequences, width) of a micro-batch, widest first; of the heaviest that may come."""
        nesting, b = self.config.granularities, self.config.training.micro_batch_size
        widths = nesting.widths[::-1]
        kind = self.config.objective.kind
        if kind == "joint":
            return tuple((b, width) for width in widths)
        if kind == "sandwich":
            drawn = [w for w, p in zip(widths[1:-1], self._shares()[-2:0:-1], strict=True) if p]
            chosen = [widths[0], *(drawn or widths[1:-1])[:1], *widths[1:][-1:]]
            return tuple((b, width) for width in chosen)
        shares = self._shares()[::-1]
        if kind == "sampled":
            widest = next(w for w, p in zip(widths, shares, strict=True) if p)
            return ((b, widest),)
        counts, left = [], b
        for share in shares:  # a micro-batch's counts are within one of b * p
            counts.append(min(left, math.ceil(b * share - 1e-9)))
            left -= counts[-1]
        return tuple((n, w) for n, w in zip(counts, widths, strict=True) if n)

    @property
    def rows(self) -> int:
        """R of a micro-batch."""
        return sum(n for n, _ in self.segments) * self.config.training.seq_len

    @property
    def first_rows(self) -> int:
        """Rows of the embedding and the first attention, which copies of a sequence share."""
        b, s = self.config.training.micro_batch_size, self.config.training.seq_len
        return b * s if self.shared_tokens else self.rows

    def own_rows(self, rows: int) -> int:
        """Of `rows`, those that a rank holds between attention, FFN and head."""
        return rows // self.tensor if self.config.parallel.sequence else rows

    @property
    def neurons(self) -> int:
        """Activations of one layer's FFN on one rank: sum of rows x width over the segments."""
        return sum(n * w for n, w in self.segments) * self.config.training.seq_len // self.tensor

    @property
    def loss_tokens(self) -> int:
        """Tokens whose rows the loss takes together: distinct ones, where segments share them."""
        return self.first_rows if self.shared_tokens else self.rows

    @property
    def loss_chunk(self) -> int:
        """Tokens of one chunk of the loss."""
        return even_chunk_tokens(
            self.loss_tokens, default_chunk_tokens(self.local_vocab, self.device)
        )

    # Work

    def _shares(self) -> list[float]:
        """Of the granularities, narrowest first."""
        names, given = self.config.granularities.names, self.config.objective.probabilities
        return [given[name] for name in names] if given else [1 / len(names)] * len(names)

    @cached_property
    def copies(self) -> list[float]:
        """How often a sequence runs at each granularity, narrowest first, on average."""
        kind, shares = self.config.objective.kind, self._shares()
        if kind == "joint":
            return [1.0] * len(shares)
        if kind != "sandwich":
            return shares
        middle = shares[1:-1]
        total = sum(middle)
        drawn = [p / total if total else 1 / len(middle) for p in middle]
        return [1.0, *drawn, 1.0][-len(shares) :]

    @cached_property
    def forward_flops_per_step(self) -> Flops:
        """Of all ranks, on average; with backward three times as many (forward, dX, dW)."""
        model, training = self.config.model, self.config.training
        nesting, sequences = self.config.granularities, training.global_batch_size
        total = Flops(0, 0, 0)
        for i, copies in enumerate(self.copies):
            segment = Segment(nesting.uniform(i, model.n_layers), sequences)
            flops = forward_flops(model, self.vocab_size, [segment], training.seq_len)
            total = total + Flops(*(round(copies * part) for part in (
                flops.attention, flops.ffn, flops.head)))  # fmt: skip
        if self.shared_tokens:  # the first layer's attention runs once
            repeated = sum(self.copies) - 1
            whole = Segment(nesting.uniform(0, model.n_layers), sequences)
            flops = forward_flops(model, self.vocab_size, [whole], training.seq_len)
            spared = round(repeated * flops.attention / model.n_layers)
            total = Flops(total.attention - spared, total.ffn, total.head)
        return total
