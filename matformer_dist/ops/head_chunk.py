"""One chunk of `multi_granularity_loss`: logits to numbers per row, and to their own gradient.

Legend: G rows of one token (row 0 the teacher), c tokens of the chunk, V rows of the head on this
rank, T tensor-parallel ranks, tau temperature.

Two passes with one small gather over the ranks between them. Both have compiled twins under the
same arguments (csrc/multi_granularity_loss/); these here are the reference:

    chunk_statistics   logits [G, c, V] -> seven numbers a row, over this rank's share
    chunk_gradient_    all ranks' numbers -> a row's losses; its logits become their gradient

All arithmetic is in fp32, or fp64 for fp64 logits. Segments are taken one by one, so that scratch
is one segment's logits and not all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ID_BASE = 1 << 20  # ids travel as two digits: fp32 does not hold every whole number above 2^24


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
    """The same over the whole vocabulary; [G, c] each. `best` is the id itself, int64."""

    lse: Tensor
    lse_tau: Tensor
    target: Tensor
    kl: Tensor
    best: Tensor


def chunk_statistics(
    logits: Tensor,
    targets: Tensor,
    offset: int,
    temperature: float,
    distills: bool,
    find_best: bool,
) -> Tensor:
    """LocalNumbers, stacked to [G, c, 7], of logits whose first column is the global id `offset`.

    targets [G, c]: global ids. distills: whether rows are compared with row 0 of their token.
    find_best: whether the ids of the largest logits are wanted; 0 otherwise.
    """
    nothing = torch.zeros_like(targets, dtype=_wide(logits))
    lowest = torch.full_like(nothing, -torch.inf)
    if logits.shape[-1] == 0:  # a rank whose share is padding alone
        return torch.stack((lowest, nothing, nothing, lowest, nothing, nothing, nothing), -1)
    top, best = logits.max(-1)
    top = top.to(nothing.dtype)
    sums = _sums(logits, top, 1.0)
    sums_tau, difference = sums, nothing
    if distills:
        if temperature != 1:
            sums_tau = _sums(logits, top, temperature)
        first = logits[0].to(nothing.dtype)
        share = first.sub(top[0, :, None]).div_(temperature).exp_()
        unseen = share == 0  # where the teacher is -inf, for one
        parts = [
            (share * (first - z)).masked_fill_(unseen, 0).sum(-1) / temperature for z in logits[1:]
        ]
        difference = torch.stack([nothing[0], *parts])
    inside, owned = _own(targets - offset, logits.shape[-1])
    at_target = logits.gather(-1, inside[..., None])[..., 0].to(nothing.dtype)
    target = torch.where(owned, at_target, lowest)
    high = low = nothing
    if find_best:
        best = best + offset
        high, low = (best // _ID_BASE).to(top.dtype), (best % _ID_BASE).to(top.dtype)
    return torch.stack((top, sums, sums_tau, target, difference, high, low), -1)


def chunk_gradient_(
    logits: Tensor,
    targets: Tensor,
    ranks: Tensor,
    ce: Tensor,
    z: Tensor,
    kl: Tensor,
    offset: int,
    ignore_index: int,
    temperature: float,
    distills: bool,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Results [4, G, c] (loss, nll, lse, kl), and each row's best id [G, c], int64.

    ranks [T, G, c, 7]: everybody's numbers. ce, z and kl [G, c] weigh a row's losses; loss is
    ce CE + z LSE^2 + kl tau^2 KL. All losses but lse are 0 at ignored rows; kl is 0 where it has no
    weight. The best id is 0 where nobody looked for it.
    Where no rank owns a target, loss, nll and gradient are NaN.

    gradient: the dtype in which logits become their gradient, their own or a narrower one, packed
    into the front of each row (see `packed`); None leaves them alone.
    """
    rows = _join(ranks, temperature)
    valid = targets != ignore_index
    unowned = valid & (rows.target == -torch.inf)
    nll = torch.where(valid, rows.lse - rows.target, 0).masked_fill(unowned, torch.nan)
    learns = valid & (kl != 0)
    learns[:1] = False
    row_kl = torch.where(learns, rows.kl, 0) if distills else torch.zeros_like(nll)
    loss = torch.where(valid, ce * nll + z * rows.lse.square() + kl * temperature**2 * row_kl, 0)
    if gradient is not None:
        _overwrite_with_gradient(
            logits,
            targets - offset,
            rows,
            ce=(ce * valid).masked_fill(unowned, torch.nan),
            z=z * valid,
            pull=kl * temperature * learns if distills else None,
            temperature=temperature,
            dtype=gradient,
        )
    return torch.stack((loss, nll, rows.lse, row_kl)), rows.best


def packed(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [..., V] in `dtype` that lies in the front of each row of logits [..., V]."""
    return logits.view(dtype)[..., : logits.shape[-1]]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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


def _join(ranks: Tensor, temperature: float) -> RowNumbers:
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
    best = local.best_high.long() * _ID_BASE + local.best_low.long()
    kl = difference + (lse_tau - lse_tau[:1])
    return RowNumbers(lse, lse_tau, local.target.amax(0), kl, best.gather(0, owner[None])[0])


def _overwrite_with_gradient(
    logits: Tensor,
    columns: Tensor,
    rows: RowNumbers,
    *,
    ce: Tensor,
    z: Tensor,
    pull: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> None:
    """Turn logits [G, c, V] into the gradient of sum(ce CE + z LSE^2 + kl tau^2 KL), packed.

    columns [G, c]: the target's column here, outside [0, V) where it is another rank's. With
    p = softmax(z), t = the teacher, pull = kl tau:
        (ce + 2 z LSE) p  -  ce at the target  +  pull (softmax(z / tau) - softmax(t / tau))
    """
    if logits.shape[-1] == 0:
        return
    teacher = None
    if pull is not None:
        teacher = _softmax_(_copy(logits[0]), rows.lse_tau[0], temperature)
    strength = ce + 2 * z * rows.lse
    inside, owned = _own(columns, logits.shape[-1])
    minus_ce = torch.where(owned, -ce, 0)
    for i, row_logits in enumerate(logits):
        wide = row_logits.to(_wide(logits))  # the logits themselves, where they are wide already
        if pull is None or teacher is None or i == 0:
            d = _softmax_(wide, rows.lse[i], 1.0).mul_(strength[i, :, None])
        elif temperature == 1:
            d = _softmax_(wide, rows.lse[i], 1.0)
            d.mul_((strength[i] + pull[i])[:, None]).sub_(teacher * pull[i, :, None])
        else:
            warm = _softmax_(_copy(wide), rows.lse_tau[i], temperature)
            d = _softmax_(wide, rows.lse[i], 1.0).mul_(strength[i, :, None])
            d.add_(warm.sub_(teacher).mul_(pull[i, :, None]))
        d.scatter_add_(-1, inside[i, :, None], minus_ce[i, :, None])
        if d.dtype != dtype or d.dtype != logits.dtype:
            packed(row_logits, dtype).copy_(d)


def _copy(z: Tensor) -> Tensor:
    return z.to(_wide(z), copy=True)


def _softmax_(z: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """softmax(z / tau) in place of z [c, V]."""
    return z.div_(temperature).sub_(lse[:, None]).exp_()
