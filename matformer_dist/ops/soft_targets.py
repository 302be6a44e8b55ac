"""Soft targets for the fused loss: label smoothing and mixup, as a correction of hard labels.

Legend: R rows, n labels, g segments that share them (R = g n, segment after segment; g = 1 for a
label a row), D d_model, V vocabulary (the classes), T tensor-parallel ranks, W the head.

Beside its log-sum, cross-entropy is linear in the logits z = h W^T. So for any label y
    CE(q) = LSE - q . z = CE(y) + h . (W[y] - q W)
and what multi_granularity_loss makes of hard labels becomes the loss to q by one dot product a row,
exactly, whichever implementation ran. With
    q = (1 - smoothing) (share onehot(y) + (1 - share) onehot(y')) + smoothing / V
the vector in brackets takes two rows of W and their sum; no logit is made again.

| operand | local, of T ranks | forward                        | backward                        |
|---------|-------------------|--------------------------------|---------------------------------|
| hidden  | the whole [R, D]  |                                | this rank's partial sum         |
| weight  | [V/T, D]          |                                | complete                        |
| result  | the whole [R]     | all-gather of R numbers, added | nothing is sent                 |

As in multi_granularity_loss, whoever calls sums hidden's gradient over the ranks: both are given
the same tensor, *behind* copy_to_ranks, whose one all-reduce serves both gradients. (On hidden
before it, every rank would need all of W[y] - q W: an all-reduce of [n, D] instead of R numbers.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from matformer_dist.ops.first_order import first_order_only
from matformer_dist.ops.vocab_shard import VocabShard


def soft_target_correction(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    others: Tensor | None = None,
    *,
    share: float = 1.0,
    smoothing: float = 0.0,
    vocab_size: int,
    vocab: VocabShard | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """CE(q) - CE(labels) of each row [R], in fp32 (fp64 for fp64); differentiable, first order.

    hidden [R, D]; weight [V/T, D], this rank's rows of the head, all of them without `vocab`.
    labels, and others of mixup [n]: int64 global ids, the same for each of R / n segments. share:
    that of `labels`, 1 without others. vocab_size: V, without padding.

    To be weighed as the loss' own cross-entropy is: of `multi_granularity_loss(hidden, weight,
    labels repeated, ...)`, total + scale * sum_r ce_r correction_r is the total to q, and nll +
    correction the nats to it. Its z-loss, KL and best ids stay what they are.

    Rows whose label is `ignore_index` are 0. An id outside of the vocabulary makes its rows NaN,
    and the gradient of hidden there. Gradients are accumulated in fp32, and are of the operands'
    dtypes.

    Raises ValueError where shapes, dtypes, devices, shares or the shard do not fit.
    """
    shard = VocabShard(0, vocab_size) if vocab is None else vocab
    _check(hidden, weight, labels, others, shard, vocab_size)
    if not (0 <= share <= 1 and 0 <= smoothing <= 1):
        raise ValueError(f"share {share} and smoothing {smoothing} must lie in 0 to 1")
    if others is None and share != 1:
        raise ValueError(f"share is {share}; without others it must be 1")
    hard = 1 - smoothing
    factors = _Factors(1 - hard * share, hard * (share - 1), -smoothing / vocab_size)
    ids = labels[None] if others is None else torch.stack((labels, others))
    ignored = labels == ignore_index
    unknown = ((ids < 0) | (ids >= vocab_size)).any(0) & ~ignored
    n = len(labels)
    h = hidden.reshape(len(hidden) // n if n else 0, n, hidden.shape[1])
    correction: Tensor = _Correction.apply(h, weight, ids, ignored, unknown, factors, shard)
    return correction.flatten()


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    others: Tensor | None,
    shard: VocabShard,
    vocab_size: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [R, D] and [V, D]"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must share a floating dtype"
        )
    ids = [labels] if others is None else [labels, others]
    if any(one.shape != (len(labels),) or one.dtype != torch.int64 for one in ids):
        raise ValueError(
            f"labels and others {[list(one.shape) for one in ids]} {[one.dtype for one in ids]} "
            "must be as many ids in int64, [n]"
        )
    devices = [t.device for t in (hidden, weight, *ids)]
    if len(set(devices)) > 1:
        raise ValueError(f"hidden, weight, labels and others ({devices}) must lie on one device")
    n, rows = len(labels), len(hidden)
    if rows % n if n else rows:
        raise ValueError(f"the {rows} rows of hidden must be a multiple of the {n} labels")
    end = shard.offset + shard.size if shard.size else 0  # padding alone may lie beyond
    if not shard.size <= len(weight) or not max(1, end) <= vocab_size or not len(weight):
        raise ValueError(
            f"{shard} does not fit a weight of {len(weight)} rows and a vocabulary of {vocab_size}"
        )


class _Factors(NamedTuple):
    """Of rows of W in W[y] - q W: that of the label, that of the other, and every one."""

    label: float
    other: float
    every: float


class _Correction(torch.autograd.Function):
    """Segments are taken one by one, so that fp32 scratch is one segment's and not all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        ignored: Tensor,
        unknown: Tensor,
        factors: _Factors,
        shard: VocabShard,
    ) -> Tensor:
        """hidden [g, n, D]; ids [1 or 2, n], labels and others; ignored, unknown [n] -> [g, n]."""
        direction = _direction(weight, ids, factors, shard)
        direction.masked_fill_(unknown[:, None], torch.nan).masked_fill_(ignored[:, None], 0)
        dots = direction.new_empty(hidden.shape[:2])
        for dot, h in zip(dots, hidden, strict=True):
            torch.sum(h * direction, dim=-1, out=dot)
        ctx.save_for_backward(hidden, ids, ignored, direction)
        # The weight itself is not kept: ZeRO-3 may let go of it.
        ctx.factors, ctx.shard, ctx.weight_rows = factors, shard, len(weight)
        if shard.gather is not None:
            dots = shard.gather(dots.view(-1, 1))().sum(0).view_as(dots)
        return dots.masked_fill_(ignored, 0)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, d_dots: Tensor) -> tuple[Tensor | None, ...]:
        hidden, ids, ignored, direction = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        strengths = d_dots.masked_fill(ignored, 0)[..., None]
        d_hidden = d_weight = None
        if needs_hidden:
            d_hidden = hidden.new_empty(hidden.shape)
            for d_h, strength in zip(d_hidden, strengths, strict=True):
                torch.mul(strength, direction, out=d_h)
        if needs_weight:
            d_direction = torch.zeros_like(direction)
            for h, strength in zip(hidden, strengths, strict=True):
                d_direction.addcmul_(h.to(direction.dtype), strength)
            d_weight = _weight_gradient(d_direction, ids, ctx.weight_rows, ctx.factors, ctx.shard)
            d_weight = d_weight.to(hidden.dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _direction(weight: Tensor, ids: Tensor, factors: _Factors, shard: VocabShard) -> Tensor:
    """This rank's part of W[y] - q W [n, D], in fp32 or better."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    direction = weight.new_zeros(ids.shape[1], weight.shape[1], dtype=dtype)
    for one, factor in zip(ids, factors, strict=False):
        row, elsewhere = _own(one, shard)
        rows = weight.index_select(0, row).masked_fill_(elsewhere[:, None], 0)
        direction.add_(rows, alpha=factor)
    if factors.every:
        direction.add_(weight[: shard.size].sum(0, dtype=dtype), alpha=factors.every)
    return direction


def _weight_gradient(
    d_direction: Tensor, ids: Tensor, weight_rows: int, factors: _Factors, shard: VocabShard
) -> Tensor:
    """Of the rows of the weight here [V/T, D], in the dtype of d_direction [n, D]."""
    parts, rows = [], []
    for one, factor in zip(ids, factors, strict=False):
        row, elsewhere = _own(one, shard)
        parts.append((d_direction * factor).masked_fill_(elsewhere[:, None], 0))
        rows.append(row)
    # As a lookup's gradient, and not by index_add: without atomics, on CUDA too.
    d_weight: Tensor = torch.ops.aten.embedding_dense_backward(
        torch.cat(parts), torch.cat(rows), weight_rows, -1, False
    )
    if factors.every:
        d_weight[: shard.size].add_(d_direction.sum(0), alpha=factors.every)
    return d_weight


def _own(ids: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Rows of ids in this rank's weight, 0 for those elsewhere, and which these are."""
    rows = ids - shard.offset
    elsewhere = (rows < 0) | (rows >= shard.size)
    return rows.masked_fill(elsewhere, 0), elsewhere
