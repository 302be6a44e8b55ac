"""Rotary position embedding, laid out as Llama's: the halves of a head turn against each other.

Legend: B sequences, s positions, h head size. Pair i of a head turns by theta^(-2i/h) a position;
the order of operations is transformers', since far positions magnify a rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig, RopeScaling


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [s, h], or [B, s, h] where sequences differ in position; in fp32."""

    cos: Tensor
    sin: Tensor

    @property
    def positions(self) -> int:
        return self.cos.shape[-2]

    @classmethod
    def of(cls, positions: Tensor, model: LanguageModelConfig) -> Rotation:
        """Of `positions` [s] or [B, s], counted from 0."""
        angles = positions.float()[..., None] * frequencies(model, positions.device)
        angles = torch.cat([angles, angles], dim=-1)
        return cls(angles.cos(), angles.sin())

    def at(self, positions: Tensor) -> Rotation:
        """Of `positions` [s] or [B, s], where this one is of all from 0 on."""
        return Rotation(self.cos[positions], self.sin[positions])

    def turn(self, x: Tensor) -> Tensor:
        """Rotate x [B, s, heads, h], in fp32, and return it in its own dtype."""
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        return (x.float() * cos + turned * sin).to(x.dtype)


def frequencies(model: LanguageModelConfig, device: torch.device | None = None) -> Tensor:
    """By how much each pair turns a position, [h / 2], fp32."""
    exponents = torch.arange(0, model.head_dim, 2, device=device).float() / model.head_dim
    plain = 1 / model.rope_theta**exponents
    return plain if model.rope_scaling is None else _scaled(plain, model.rope_scaling)


def _scaled(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Slower, so that longer texts turn no further.

    linear  all by `factor` (Chen et al., arXiv 2306.15595)
    llama3  by `factor` what turns at most `low_freq_factor` times in the original context, not at
            all what turns `high_freq_factor` times or more, in between a mean (Llama 3.1)
    """
    if scaling.kind == "linear":
        return plain / scaling.factor
    assert scaling.original_max_seq_len is not None
    turns = scaling.original_max_seq_len / (2 * math.pi / plain)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain
