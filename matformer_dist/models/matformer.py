"""MatFormer: what nested language models and vision encoders share.

Legend: b samples (sequences of tokens, or images), B samples in flight, s positions of a sample,
R = B * s rows, D d_model, V outputs (tokens of the vocabulary, or classes).

Rows are ordered segment by segment. Embedding, attention and norms do not see segments; the
nested FFN does. With shared tokens, every segment holds the same b samples: they are equal until
the first FFN, so embedding and the first layer's attention run once, on b samples.

With sequence parallelism a rank holds R/T of the rows between attention, FFN and head (see
parallel/sequence.py); N are those that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matformer_dist.config import ModelConfig
from matformer_dist.models.block import Block
from matformer_dist.models.cache import KeyValueCache, Span
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.head import Head
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting, Segment
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import TensorParallel


class MatFormer(nn.Module):
    """A nested Transformer, or any submodel taken out of one.

    `nestings` has one entry a layer: all equal for a universal model; an extracted submodel has
    the granularities up to its own in each layer, so it is nested still.
    """

    def __init__(
        self,
        model: ModelConfig,
        nestings: Sequence[Nesting],
        embedding: nn.Module,
        final_norm: nn.Module,
        head: Head,
        init: Initializer,
        tensor: TensorParallel,
    ) -> None:
        super().__init__()
        assert len(nestings) == model.n_layers
        self.model = model
        self.outputs = head.outputs
        self.tensor = tensor
        self.activation_checkpointing: Literal["none", "selective", "full"] = "none"
        self.embedding = embedding
        self.layers = nn.ModuleList(
            Block(f"layers.{i}", model, nesting, init, tensor) for i, nesting in enumerate(nestings)
        )
        self.final_norm = final_norm
        self.head = head

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def tied_weight(self) -> Tensor | None:
        """The embedding's, where the head has none of its own."""
        return None

    def compile_layers(self) -> None:
        """By torch.compile, as `activation_checkpointing` lets it."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            if self.activation_checkpointing == "selective":
                layer.compile_parts()
            else:
                layer.compile()

    def through_layers(
        self,
        x: Tensor,
        positions: int,
        segments: Sequence[Segment],
        shared_tokens: bool,
        rotation: Rotation | None = None,
        cache: tuple[KeyValueCache, Span] | None = None,
    ) -> Tensor:
        """Embedded rows [N, D] of samples of `positions` rows -> [N, D], segment by segment."""
        rows = [segment.sequences * positions for segment in segments]
        again = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        for i, layer in enumerate(self.layers):
            widths = [segment.submodel.widths[i] for segment in segments]
            repeat = len(segments) if shared_tokens and i == 0 else 1
            arguments = (
                positions,
                rotation,
                rows,
                widths,
                repeat,
                cache[0].layer(i, cache[1]) if cache is not None else None,
                again == "selective",
            )
            if again == "full":
                x = checkpoint(layer, x, *arguments, use_reentrant=False)
            else:
                x = layer(x, *arguments)
        return x

    def hidden(
        self, inputs: Tensor, segments: Sequence[Segment], shared_tokens: bool = False
    ) -> Tensor:
        """The rows that the head sees, segment by segment."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, targets: Tensor, plan: Pass) -> tuple[Tensor, Tensor]:
        """One pass over all segments.

        inputs [b, ...], targets [b, predictions]; b is the sum of the segments' samples, or, with
        shared tokens, each segment's own. Returns the total loss (0-d) and, per sample, segment by
        segment, sums over its predictions [B, 5]: negative log-likelihood in nats, agreements with
        the first segment's top-1, KL from the first segment in nats, the number of predictions,
        and those whose top-1 is the target. Without shared tokens nobody looks for the top-1:
        agreements and the last are 0.
        """
        hidden = self.hidden(inputs, plan.segments, plan.shared_tokens)
        return self.head(hidden, self.tied_weight, targets, plan)
