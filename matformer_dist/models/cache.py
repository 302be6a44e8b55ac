"""Keys and values of what a model has read, of sequences of different lengths.

Legend: B sequences, s positions of a pass, K key-value heads, h head size, T ranks.

One cache serves all layers of a model, whichever submodel runs: that of position p is written by
who reads the token at p. A pass reads s tokens of every sequence, each behind its own `lengths[i]`.
Shorter ones may be padded on the right: what lies at or beyond a sequence's length is seen by no
position before it, and overwritten by what is read there later. So `cut` is all there is to taking
tokens back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matformer_dist.models.rotation import Rotation


@dataclass(frozen=True)
class Span:
    """Where the s tokens of a pass stand, the same for every layer.

    positions  [s] where all sequences are equally long, so that keys are written as one block
               and SDPA needs no mask, or one for all; else [B, s]
    end        keys that the pass sees, counted from the first
    mask       [s, end] or [B, 1, s, end], true where a key is seen; None: `is_causal` says it
    sequences  [B, 1], their numbers, beside positions [B, s]; None beside [s]
    """

    positions: Tensor
    start: int  # the first of them, where all sequences are equally long
    end: int
    mask: Tensor | None
    is_causal: bool
    sequences: Tensor | None = None

    @classmethod
    def behind(cls, lengths: Sequence[int], s: int, device: torch.device) -> Span:
        """Of the next s positions of sequences of these lengths."""
        start, end = lengths[0], max(lengths) + s
        if min(lengths) == max(lengths):
            positions, sequences = torch.arange(start, end, device=device), None
        else:
            firsts = torch.tensor(lengths, device=device)
            positions = firsts[:, None] + torch.arange(s, device=device)
            sequences = torch.arange(len(lengths), device=device)[:, None]
        # Without a mask SDPA's causal one starts at the first key, and a single query sees all.
        if positions.dim() == 1 and (start == 0 or s == 1):
            return cls(positions, start, end, None, s > 1)
        mask = torch.arange(end, device=device) <= positions[..., None]
        mask = mask if mask.dim() == 2 else mask[:, None]
        return cls(positions, start, end, mask, False, sequences)


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [B, K/T, capacity, h], for one pass."""

    keys: Tensor
    values: Tensor
    span: Span

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write those of the pass [B, K/T, s, h]; all that it sees, [B, K/T, end, h]."""
        span = self.span
        for kept, new in ((self.keys, keys), (self.values, values)):
            if span.sequences is None:
                kept[:, :, span.start : span.end] = new
            else:
                kept[span.sequences, :, span.positions] = new.transpose(1, 2)
        return self.keys[:, :, : span.end], self.values[:, :, : span.end]


@dataclass
class KeyValueCache:
    """keys, values: of each layer, [B, K/T, capacity, h]; `lengths`: tokens read of each sequence.

    Lengths are plain numbers, so that no pass waits for a GPU to know its shapes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[int]
    rotation: Rotation  # of all positions

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def begin(self, s: int) -> Span:
        """The next pass, which reads s tokens of every sequence."""
        assert max(self.lengths) + s <= self.capacity, "the caller checks the context length"
        return Span.behind(self.lengths, s, self.keys[0].device)

    def layer(self, i: int, span: Span) -> LayerCache:
        return LayerCache(self.keys[i], self.values[i], span)

    def end(self, s: int) -> None:
        """The pass is over: all sequences are s tokens longer."""
        self.lengths = [length + s for length in self.lengths]

    def cut(self, lengths: Sequence[int]) -> None:
        """Take back what lies beyond these lengths; shorter sequences stay as they are."""
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences, in this order."""
        if list(rows) == list(range(len(self.lengths))):
            return
        index = torch.tensor(rows, dtype=torch.long, device=self.keys[0].device)
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):  # layer by layer, so that one is twice in memory
                tensors[i] = tensor.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
