"""How the next token is chosen, and what is random about it.

Legend: B rows, n tokens, V vocabulary.

All that is random of a prompt follows from (seed, its index among the prompts, the number of the
token): what a prompt gets does not depend on what else is answered with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matformer_dist.errors import UserError

_COLDEST = 1e-30  # fp32 holds it; a difference of logits over less is as good as infinite
# Columns of `uniforms`: for the token itself, for a draft of it, and for the verdict on the draft.
DRAW, DRAFT, VERDICT = range(3)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: among the likeliest `top_k` (0: all), and of these among the
    fewest that together hold `top_p` of their probability. Temperature 0 takes the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 (the likeliest) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1 (no limit)")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 0 (no limit) or above")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [..., V] -> what tokens are drawn with, [..., V] in fp32; not for greedy."""
        # The likeliest is at 0 and the others below, so that none overflows where little is left.
        scores = logits.float()
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / max(self.temperature, _COLDEST)
        if not self.top_k and self.top_p == 1:
            return scores.softmax(dim=-1)
        scores, ids = scores.sort(dim=-1, descending=True)
        if self.top_k:
            scores[..., self.top_k :] = float("-inf")
        shares = scores.softmax(dim=-1)
        likelier = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(likelier >= max(self.top_p, _COLDEST), 0.0)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        return torch.zeros_like(shares).scatter_(-1, ids, shares)

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """logits [B, V], uniforms [B] -> ids [B]."""
        if self.is_greedy:
            return logits.argmax(dim=-1)
        return draw(self.probabilities(logits), uniforms)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [...] with probabilities proportional to weights [..., V], at uniforms [...] in [0, 1).

    The first id whose cumulated weight is above the uniform's share of all: one of weight 0 never
    is. Summed in fp64, where a large vocabulary's small weights are not lost.
    """
    cumulated = weights.double().cumsum(dim=-1)
    target = uniforms.double().unsqueeze(-1) * cumulated[..., -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1)


def uniforms(seed: int, prompts: Sequence[int], n: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for n tokens of the prompts with these indices, [B, n, 3] in fp64."""
    rows = []
    for prompt in prompts:
        digest = hashlib.sha256(f"seed {seed}, prompt {prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(n, 3, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(device)
