"""One chunk of `multi_granularity_loss`: logits to numbers per row, and to their own gradient.

Legend: G rows of one token (row 0 the teacher), c tokens of the chunk, V rows of the head on this
rank, T tensor-parallel ranks, tau temperature.

All arithmetic is in the dtype of the logits (fp32 or fp64). Segments are taken one by one, so that
scratch is one segment's logits and not all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ID_BASE = 1 << 20  # ids travel as two digits: fp32 does not hold every whole number above 2^24


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the head.

    offset   global id of the first row; grows with the rank
    size     rows that are real vocabulary; what `weight` holds beyond is padding: no part in the
             softmax, zero gradient
    gather   [m, k] -> [T, m, k] over the tensor-parallel ranks; None on one rank
    """

    offset: int
    size: int
    gather: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """What does not depend on the values: layout, weights of the rows [G, n], options."""

    ce: Tensor
    z: Tensor
    kl: Tensor
    students: tuple[bool, ...]  # which of the G rows of a token learn from the first
    temperature: float
    shared: bool
    ignore_index: int
    vocab: VocabShard
    chunk: int
    check_targets: bool


class RowResults(NamedTuple):
    """Results per row, [G, c] of a chunk or [G, n] of all."""

    loss: Tensor
    nll: Tensor
    lse: Tensor
    kl: Tensor
    agrees: Tensor


def reduce_chunk(
    logits: Tensor, y: Tensor, part: slice, plan: Plan, write_gradient: bool
) -> RowResults:
    """Numbers of the rows of a chunk; its logits [G, c, V] become their gradient if asked."""
    ce, z, kl = (weights[:, part] for weights in (plan.ce, plan.z, plan.kl))
    columns = y - plan.vocab.offset
    local = torch.stack(
        local_numbers(
            logits,
            columns,
            offset=plan.vocab.offset,
            students=plan.students,
            temperature=plan.temperature,
            find_best=plan.shared,
        ),
        -1,
    )
    gather = plan.vocab.gather
    ranks = gather(local.flatten(0, 1)) if gather else local
    rows = join(ranks.view(-1, *local.shape), plan.temperature)
    valid = y != plan.ignore_index
    unowned = valid & (rows.target == -torch.inf)
    if plan.check_targets and bool(unowned.any()):
        raise ValueError(f"targets {y[unowned][:5].tolist()} are not ids of the vocabulary")
    nll = torch.where(valid, rows.lse - rows.target, 0).masked_fill(unowned, torch.nan)
    row_kl = torch.where(valid & (kl != 0), rows.kl, 0)
    loss = ce * nll + z * rows.lse.square() + kl * plan.temperature**2 * row_kl
    if write_gradient:
        overwrite_with_gradient(
            logits,
            columns,
            rows,
            ce=(ce * valid).masked_fill(unowned, torch.nan),
            z=z * valid,
            kl=kl * valid,
            students=plan.students,
            temperature=plan.temperature,
        )
    agrees = valid & (rows.best == rows.best[:1]).all(-1)
    return RowResults(torch.where(valid, loss, 0), nll, rows.lse, row_kl, agrees)


class LocalNumbers(NamedTuple):
    """What one rank says of each row, over its share of the vocabulary; [G, c] each.

    top         largest logit
    sum         of exp(z - top)
    sum_tau     of exp((z - top) / tau)
    target      logit of the target, -inf where another rank owns it
    difference  sum of exp((z_teacher - top_teacher) / tau) * (z_teacher - z) / tau
    best_high, best_low   id of the largest logit, the lowest one of equals, as two digits
    """

    top: Tensor
    sum: Tensor
    sum_tau: Tensor
    target: Tensor
    difference: Tensor
    best_high: Tensor
    best_low: Tensor


class RowNumbers(NamedTuple):
    """The same over the whole vocabulary; [G, c] each. `best` is a pair of digits [G, c, 2]."""

    lse: Tensor
    lse_tau: Tensor
    target: Tensor
    kl: Tensor
    best: Tensor


def local_numbers(
    logits: Tensor,
    columns: Tensor,
    *,
    offset: int,
    students: Sequence[bool],
    temperature: float,
    find_best: bool,
) -> LocalNumbers:
    """Numbers of logits [G, c, V] whose first column is the global id `offset`.

    columns [G, c]: the target's column here, outside [0, V) where it is another rank's. students:
    which of the G rows are compared with row 0.
    """
    nothing = torch.zeros_like(columns, dtype=logits.dtype)
    lowest = torch.full_like(nothing, -torch.inf)
    if logits.shape[-1] == 0:  # a rank whose share is padding alone
        return LocalNumbers(lowest, nothing, nothing, lowest, nothing, nothing, nothing)
    top, best = logits.max(-1)
    sums = _sums(logits, top, 1.0)
    sums_tau, difference = sums, nothing
    if any(students):
        if temperature != 1:
            sums_tau = _sums(logits, top, temperature)
        teacher = logits[0].sub(top[0, :, None]).div_(temperature).exp_()
        difference = torch.stack(
            [
                (teacher * (logits[0] - z)).sum(-1) / temperature if learns else nothing[0]
                for z, learns in zip(logits, students, strict=True)
            ]
        )
    inside, owned = _own(columns, logits.shape[-1])
    target = torch.where(owned, logits.gather(-1, inside[..., None])[..., 0], lowest)
    high = low = nothing
    if find_best:
        best = best + offset
        high, low = (best // _ID_BASE).to(logits.dtype), (best % _ID_BASE).to(logits.dtype)
    return LocalNumbers(top, sums, sums_tau, target, difference, high, low)


def _sums(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    return torch.stack(
        [
            z.sub(largest[:, None]).div_(temperature).exp_().sum(-1)
            for z, largest in zip(logits, top, strict=True)
        ]
    )


def _own(columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Columns brought into [0, size), and whether they were there."""
    return columns.clamp(0, size - 1), (columns >= 0) & (columns < size)


def join(ranks: Tensor, temperature: float) -> RowNumbers:
    """Numbers of the whole vocabulary from stacked LocalNumbers [T, G, c, 7].

    A target that no rank owns comes out as -inf. A row equal to the teacher's has a KL of exactly
    0: its differences are 0 and the two log-sums cancel.
    """
    local = LocalNumbers(*ranks.unbind(-1))
    top, owner = local.top.max(0)  # the first rank of equals: ids grow with the rank
    lse = top + (local.sum * (local.top - top).exp()).sum(0).log()
    share = ((local.top - top) / temperature).exp()
    sum_tau = (local.sum_tau * share).sum(0)
    lse_tau = top / temperature + sum_tau.log()
    difference = (local.difference * share[:, :1]).sum(0) / sum_tau[:1]
    digits = torch.stack((local.best_high, local.best_low), -1)
    best = digits.gather(0, owner[None, ..., None].expand(1, *owner.shape, 2))[0]
    return RowNumbers(
        lse, lse_tau, local.target.amax(0), difference + (lse_tau - lse_tau[:1]), best
    )


def overwrite_with_gradient(
    logits: Tensor,
    columns: Tensor,
    rows: RowNumbers,
    *,
    ce: Tensor,
    z: Tensor,
    kl: Tensor,
    students: Sequence[bool],
    temperature: float,
) -> None:
    """Turn logits [G, c, V] into the gradient of sum(ce CE + z LSE^2 + kl tau^2 KL).

    ce, z, kl [G, c]; kl is read where `students` says so. With p = softmax(z), t = the teacher:
        (ce + 2 z LSE) p  -  ce at the target  +  kl tau (softmax(z / tau) - softmax(t / tau))
    """
    if logits.shape[-1] == 0:
        return
    teacher = None
    if any(students):
        teacher = _softmax(logits[0].clone(), rows.lse_tau[0], temperature)
    strength = ce + 2 * z * rows.lse
    for i, learns in enumerate(students):
        if teacher is None or not learns:
            _softmax(logits[i], rows.lse[i], 1.0).mul_(strength[i, :, None])
            continue
        pull = kl[i, :, None] * temperature
        if temperature == 1:
            p = _softmax(logits[i], rows.lse[i], 1.0)
            p.mul_(strength[i, :, None] + pull).sub_(teacher * pull)
        else:
            warm = _softmax(logits[i].clone(), rows.lse_tau[i], temperature)
            p = _softmax(logits[i], rows.lse[i], 1.0)
            p.mul_(strength[i, :, None]).add_(warm.sub_(teacher).mul_(pull))
    inside, owned = _own(columns, logits.shape[-1])
    logits.scatter_add_(-1, inside[..., None], torch.where(owned, -ce, 0)[..., None])


def _softmax(z: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """softmax(z / tau) in place of z [c, V]."""
    return z.div_(temperature).sub_(lse[:, None]).exp_()
