"""A run as planning sees it: configuration, vocabulary, ranks; the weights and rows of one rank.

Legend: b samples (sequences or images) of a micro-batch, s positions of a sample, R rows (positions
of all segments), D d_model, F d_ff, V outputs (tokens of the vocabulary, or classes), T
tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from matformer_dist.chunks import default_chunk_tokens, even_chunk_tokens
from matformer_dist.config import Config, ModelConfig
from matformer_dist.config_vision import VisionModelConfig, VisionObjectiveConfig
from matformer_dist.counting import (
    HEAD_BIAS_COLUMNS,
    Flops,
    attention_weights,
    ffn_matrices,
    forward_flops,
)
from matformer_dist.nesting import Segment

OUTPUT_BIASES = ("b_out", "b_down")  # which every rank holds whole


def reduce_bucket(parameters: int) -> int:
    """Elements of DeepSpeed's buffer for gradients of a rank's weights: its default, or all."""
    return min(500_000_000, parameters)


class Module(NamedTuple):
    """Weights that are used together, as elements by name; of which vectors do not decay."""

    kind: Literal["embedding", "norm", "attention", "ffn", "head"]
    matrices: dict[str, int]
    vectors: dict[str, int] = {}  # noqa: RUF012  # of a tuple, never changed

    @property
    def weights(self) -> dict[str, int]:
        return {**self.matrices, **self.vectors}


@dataclass(frozen=True)
class PlannedRun:
    """`data_size` data-parallel ranks, each of config.parallel.tensor devices of a kind."""

    config: Config
    outputs: int
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
    def units_per_step(self) -> int:
        """Tokens, or images."""
        return self.config.units(self.config.training.global_batch_size)

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return 2 if self.config.training.precision == "bf16" else 4

    # Weights

    @property
    def local_outputs(self) -> int:
        """Rows of this rank's share of the head, padding included."""
        return -(-self.outputs // self.tensor)

    @property
    def head_width(self) -> int:
        """Columns of the head: a bias is one more, filled up (see models/head.py)."""
        model = self.config.model
        return model.d_model + (HEAD_BIAS_COLUMNS if model.biases else 0)

    @cached_property
    def modules(self) -> list[Module]:
        """Of one rank, as the forward pass meets them: embedding; norm, attention, norm and FFN of
        each layer; norm; head, empty where tied.
        """
        model, tensor = self.config.model, self.tensor
        norms = 2 if model.norm == "layernorm" else 1
        out = model.d_model * model.attention_width // tensor
        qkv = attention_weights(model) // tensor - out
        width = model.d_ff // tensor
        inputs = ffn_matrices(model) - 1

        def norm(name: str) -> Module:
            return Module("norm", {}, {f"{name} {k}": model.d_model for k in range(norms)})

        def biases(**sizes: int) -> dict[str, int]:
            return sizes if model.biases else {}

        found = [_embedding(model, self.local_outputs)]
        for i in range(model.n_layers):
            of_attention = {f"{i} b_qkv": qkv // model.d_model, f"{i} b_out": model.d_model}
            of_ffn = {f"{i} b_in": inputs * width, f"{i} b_down": model.d_model}
            neurons = width * model.d_model
            of_neurons = {f"{i} w_in": inputs * neurons, f"{i} w_down": neurons}
            found += [
                norm(f"{i} attention norm"),
                Module("attention", {f"{i} w_qkv": qkv, f"{i} w_out": out}, biases(**of_attention)),
                norm(f"{i} ffn norm"),
                Module("ffn", of_neurons, biases(**of_ffn)),
            ]
        table = self.local_outputs * model.d_model
        head = {"head": table} if model.head_parameters(self.outputs) else {}
        bias = biases(**{"head bias": self.local_outputs})
        return [*found, norm("norm"), Module("head", head, bias)]

    @cached_property
    def matrices(self) -> dict[str, int]:
        """Elements of one rank's matrices; those of layers once for each of their kinds."""
        kinds = ("attention", "ffn", "embedding", "head")
        return {
            kind: sum(sum(of.matrices.values()) for of in self.modules if of.kind == kind)
            for kind in kinds
        }

    @cached_property
    def vectors(self) -> int:
        """Elements of all norms and biases, which do not decay."""
        return sum(sum(module.vectors.values()) for module in self.modules)

    @property
    def parameters(self) -> int:
        """Elements of one rank's weights, before ZeRO cuts them."""
        return sum(self.matrices.values()) + self.vectors

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
    def reads_text(self) -> bool:
        """Tokens are looked up, positions rotated, and all rows go to the head; those of an image
        are pooled before.
        """
        return self.config.unit == "tokens"

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
    def softens_targets(self) -> bool:
        """Whether every micro-batch's are; where only some are mixed, more than there will be."""
        objective = self.config.objective
        if not isinstance(objective, VisionObjectiveConfig):
            return False
        return bool(objective.label_smoothing or objective.mixup or objective.cutmix)

    @property
    def samples(self) -> int:
        """In flight, of a micro-batch."""
        return sum(n for n, _ in self.segments)

    @property
    def distinct_samples(self) -> int:
        return self.config.training.micro_batch_size if self.shared_tokens else self.samples

    @property
    def rows(self) -> int:
        """R of a micro-batch."""
        return self.samples * self.config.sample.positions

    @property
    def first_rows(self) -> int:
        """Rows of the embedding and the first attention, which copies of a sample share."""
        return self.distinct_samples * self.config.sample.positions

    def own_rows(self, rows: int) -> int:
        """Of `rows`, those that a rank holds between attention, FFN and head."""
        return rows // self.tensor if self.config.parallel.sequence else rows

    @property
    def neurons(self) -> int:
        """Activations of one layer's FFN on one rank: sum of rows x width over the segments."""
        return sum(n * w for n, w in self.segments) * self.config.sample.positions // self.tensor

    @property
    def head_rows(self) -> int:
        """Rows that the head sees."""
        return self.samples * self.config.sample.predictions

    @property
    def loss_tokens(self) -> int:
        """Predictions whose rows the loss takes together: distinct ones, where segments share
        them.
        """
        return self.distinct_samples * self.config.sample.predictions

    @property
    def loss_chunk(self) -> int:
        """Predictions of one chunk of the loss."""
        return even_chunk_tokens(
            self.loss_tokens, default_chunk_tokens(self.local_outputs, self.device)
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
        model, sample = self.config.model, self.config.sample
        nesting, samples = self.config.granularities, self.config.training.global_batch_size
        total = Flops(0, 0, 0)
        for i, copies in enumerate(self.copies):
            segment = Segment(nesting.uniform(i, model.n_layers), samples)
            flops = forward_flops(model, self.outputs, [segment], sample)
            total = total + Flops(*(round(copies * part) for part in (
                flops.attention, flops.ffn, flops.head, flops.embedding)))  # fmt: skip
        if self.shared_tokens:  # embedding and the first layer's attention run once
            repeated = sum(self.copies) - 1
            whole = Segment(nesting.uniform(0, model.n_layers), samples)
            flops = forward_flops(model, self.outputs, [whole], sample)
            spared = round(repeated * flops.attention / model.n_layers)
            of_embedding = round(repeated * flops.embedding)
            total = total + Flops(-spared, 0, 0, -of_embedding)
        return total


def _embedding(model: ModelConfig, local_outputs: int) -> Module:
    if not isinstance(model, VisionModelConfig):
        return Module("embedding", {"embedding": local_outputs * model.d_model})
    D = model.d_model
    vectors = {"embedding bias": D}
    if model.pooling == "token":
        vectors["class token"] = D
    if model.positions == "learned":
        vectors["positions"] = model.rows * D
    return Module("embedding", {"embedding": model.patch_values * D}, vectors)
