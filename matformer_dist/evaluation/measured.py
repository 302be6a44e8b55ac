"""What was measured of one submodel on validation data, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log
from typing import Any

from torch import Tensor

from matformer_dist.evaluation.intervals import interval, resampled_means

_LONGEST = 700.0  # exp() of more is no float


@dataclass(frozen=True)
class Measured:
    """Sums over each sequence [sequences, 5], fp64, as MatFormer.forward has them: nll, agreements
    with XL, KL from XL, tokens, correct ones.

    `text_bytes`: of all targets, in UTF-8; None where they are no text.
    """

    sequences: Tensor
    text_bytes: int | None

    @property
    def predictions(self) -> int:
        return int(self.sequences[:, 3].sum())

    def mean(self, column: int) -> float:
        return float(self.sequences[:, column].sum() / self.sequences[:, 3].sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.mean(0)

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode the text, ends of documents included, per byte of it (Gao et al., The
        Pile, sec. 3.1)."""
        if not self.text_bytes:
            return inf
        return float(self.sequences[:, 0].sum()) / (log(2) * self.text_bytes)

    @cached_property
    def resampled(self) -> Tensor:
        """Means a token of all sums, in their order, [RESAMPLES, 5]."""
        return resampled_means(self.sequences, self.sequences[:, 3])

    def described(self) -> dict[str, Any]:
        """As evaluation.json has it: means per token and 95% intervals."""
        found: dict[str, Any] = {}
        for column, name in ((0, "loss"), (1, "agreement"), (2, "kl"), (4, "accuracy")):
            found[name] = self.mean(column)
            found[f"{name}_interval"] = interval(self.resampled[:, column])
        if self.text_bytes is not None:
            found["perplexity"] = exp(min(self.loss, _LONGEST))
            found["bits_per_byte"] = self.bits_per_byte
        return found


def gain(ours: Measured, other: Measured) -> tuple[float, tuple[float, float]]:
    """By how many nats a token `ours` is below the other, both on the same sequences; interval."""
    difference = other.resampled[:, 0] - ours.resampled[:, 0]
    return other.loss - ours.loss, interval(difference)
