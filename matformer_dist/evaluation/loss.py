"""Validation loss of submodels, and their consistency with XL (paper sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from matformer_dist.models.forward_pass import Pass
from matformer_dist.nesting import Submodel

RunPass = Callable[[Tensor, Tensor, Pass], Tensor]


@dataclass(frozen=True)
class SubmodelLoss:
    """Means over `tokens` validation tokens: nats per token, share of tokens, nats per token."""

    loss: float
    agreement: float  # top-1 prediction equal to XL's, given the same prefix
    kl: float  # KL(XL || submodel)
    tokens: int


def evaluate_submodels(
    run_pass: RunPass,
    batches: Iterable[tuple[Tensor, Tensor]],
    submodels: Sequence[Submodel],
    largest: Submodel,
    *,
    per_pass: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> dict[str, SubmodelLoss]:
    """Losses of `submodels` on the same (tokens, targets) [b, s] batches, keyed by notation.

    `run_pass` returns a pass' statistics [n, 4] (see MatLM.forward). At most `per_pass` submodels
    run at once, XL always among them, as what agreement and KL refer to. `group` holds the ranks
    whose batches differ.
    """
    others = [submodel for submodel in dict.fromkeys(submodels) if submodel != largest]
    groups = [[largest, *part] for part in _parts(others, max(1, per_pass - 1))] or [[largest]]
    sums = [torch.zeros(len(part), 4, dtype=torch.float64, device=device) for part in groups]
    for tokens, targets in batches:
        for part, total in zip(groups, sums, strict=True):
            plan = Pass.evaluation(part, tokens.shape[0])
            total += run_pass(tokens, targets, plan).to(total.dtype)
    results: dict[str, SubmodelLoss] = {}
    for part, total in zip(groups, sums, strict=True):
        if group is not None:
            dist.all_reduce(total, group=group)
        for submodel, (nll, agreed, kl, count) in zip(part, total.tolist(), strict=True):
            tokens_seen = max(count, 1.0)
            results[str(submodel)] = SubmodelLoss(
                nll / tokens_seen, agreed / tokens_seen, kl / tokens_seen, int(count)
            )
    return {str(submodel): results[str(submodel)] for submodel in dict.fromkeys(submodels)}


def _parts(items: list[Submodel], size: int) -> Iterator[list[Submodel]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
