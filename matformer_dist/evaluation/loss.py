"""Validation loss of submodels, and their consistency with XL (paper sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.models.forward_pass import Pass
from matformer_dist.nesting import Submodel

RunPass = Callable[[Tensor, Tensor, Pass], Tensor]


@dataclass(frozen=True)
class SubmodelLoss:
    """Means over `tokens` validation tokens: loss and kl in nats per token, shares of tokens."""

    loss: float
    agreement: float  # top-1 prediction equal to XL's, given the same prefix
    kl: float  # KL(XL || submodel)
    accuracy: float  # top-1 prediction equal to the target
    tokens: int

    @classmethod
    def of(cls, nll: float, agreed: float, kl: float, count: float, correct: float) -> SubmodelLoss:
        """Of sums over tokens and their number, in the order of MatFormer.forward."""
        tokens = max(count, 1.0)
        return cls(nll / tokens, agreed / tokens, kl / tokens, correct / tokens, int(count))


def evaluate_submodels(
    run_pass: RunPass,
    batches: Iterable[tuple[Tensor, Tensor]],
    submodels: Sequence[Submodel],
    largest: Submodel,
    *,
    per_pass: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, SubmodelLoss]:
    """Losses of `submodels` on the same (tokens, targets) [b, s] batches, keyed by notation.

    As `measure_sequences`; `group` holds the ranks whose batches differ.
    """
    measured = measure_sequences(run_pass, batches, submodels, largest, per_pass=per_pass)
    results: dict[str, SubmodelLoss] = {}
    for submodel, sequences in measured.items():
        total = sequences.sum(dim=0)
        if group is not None:
            dist.all_reduce(total, group=group)
        results[str(submodel)] = SubmodelLoss.of(*total.tolist())
    return results


def measure_sequences(
    run_pass: RunPass,
    batches: Iterable[tuple[Tensor, Tensor]],
    submodels: Sequence[Submodel],
    largest: Submodel,
    *,
    per_pass: int,
) -> dict[Submodel, Tensor]:
    """Sums over each sequence's tokens [sequences, 5], fp64, of every submodel on all batches.

    What is summed, and what `run_pass` returns of one pass: see MatFormer.forward. At most
    `per_pass` submodels run at once, XL always among them, as what agreement and KL refer to.
    """
    wanted = list(dict.fromkeys(submodels))
    others = [submodel for submodel in wanted if submodel != largest]
    size = max(1, per_pass - 1)
    groups = [[largest, *others[i : i + size]] for i in range(0, len(others), size)] or [[largest]]
    found: dict[Submodel, list[Tensor]] = {submodel: [] for submodel in (largest, *others)}
    for tokens, targets in batches:
        b = tokens.shape[0]
        for i, group in enumerate(groups):
            statistics = run_pass(tokens, targets, Pass.evaluation(group, b)).double()
            for submodel, sequences in list(zip(group, statistics.split(b), strict=True))[i > 0 :]:
                found[submodel].append(sequences)
    return {submodel: torch.cat(found[submodel]) for submodel in wanted}


def sparing(run_pass: RunPass) -> RunPass:
    """The same, in halves of a pass where the GPU's memory does not hold all of its submodels.

    The first submodel is in every part; what was too many is not tried again. For one process:
    ranks would part ways. UserError where two submodels are too many.
    """
    most: int | None = None

    def spare(tokens: Tensor, targets: Tensor, plan: Pass) -> Tensor:
        nonlocal most
        b, (first, *others) = tokens.shape[0], (segment.submodel for segment in plan.segments)
        if most is None or len(plan.segments) <= most:
            try:
                return run_pass(tokens, targets, plan)
            except torch.OutOfMemoryError:
                most = (len(plan.segments) + 1) // 2
        if len(plan.segments) <= 2:
            raise UserError(
                f"the memory of the GPU does not hold the model and a pass over {b} sequences of "
                f"{tokens.shape[1]} tokens; evaluate with --device cpu, or on a larger one"
            )
        half = len(others) // 2
        parts = [Pass.evaluation([first, *part], b) for part in (others[:half], others[half:])]
        found = [spare(tokens, targets, part) for part in parts]
        return torch.cat([found[0], found[1][b:]])

    return spare
