"""Losses of all granularities in one pass over the head, in plain torch: the oracle of kernels.

Legend: R rows, D d_model, V rows of the head on this rank, G rows of one token, n tokens, c tokens
of a chunk, T tensor-parallel ranks.

Segments lie widest first. With `shared_tokens` row j of every segment is the same token, so a
chunk takes a range of tokens with all their G rows, and segment 0 (XL) teaches the others.
Otherwise G = 1 and a chunk is a range of rows.

A chunk's logits are made, reduced to a few numbers a row, overwritten by their gradient and
multiplied into the gradients of hidden and weight: they never live beyond the chunk. Under vocab
parallelism one gather a chunk joins the ranks' numbers. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matformer_dist.ops.head_chunk import Plan, RowResults, VocabShard, reduce_chunk

__all__ = ["LossOutput", "VocabShard", "default_chunk_tokens", "multi_granularity_loss"]

CHUNK_BYTES = 128 << 20
"""Logits of one segment in one chunk. Not of all segments: the number of chunks, hence of
collectives, is that of a step of XL alone, whatever the number of granularities."""


class LossOutput(NamedTuple):
    """`total` (0-d) is differentiable, the rest is detached. fp32 (fp64 for fp64 inputs).

    nll     [R] cross-entropy in nats, 0 at ignored rows
    lse     [R] log of the sum of exponentials of the logits
    kl      [R] KL(teacher || row) at the temperature, 0 at ignored rows and without distillation
    agrees  [R] bool, top-1 equal to the teacher's, False at ignored rows; None unless tokens are
            shared
    """

    total: Tensor
    nll: Tensor
    lse: Tensor
    kl: Tensor
    agrees: Tensor | None


def default_chunk_tokens(local_vocab: int, itemsize: int = 4) -> int:
    """Most tokens of a chunk, for a weight of `local_vocab` rows and logits of `itemsize` bytes.

    The same on all ranks, whose weights have the same number of rows, padding included.
    """
    return max(1, CHUNK_BYTES // (max(1, local_vocab) * itemsize))


@torch.compiler.disable(reason="chunks and collectives; nothing left to fuse across")
def multi_granularity_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Sequence[int],
    ce_weights: Sequence[float],
    z_weights: Sequence[float],
    kl_weights: Sequence[float],
    scale: Tensor,
    shared_tokens: bool,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab: VocabShard | None = None,
    chunk_tokens: int | None = None,
    check_targets: bool = False,
) -> LossOutput:
    """scale * sum over rows r of ce CE_r + z LSE_r^2 + kl tau^2 KL(softmax(z_T/tau) || ...r/tau).

    hidden [R, D]; weight [V, D], this rank's rows of the head; targets [R] int64 global ids, rows
    with `ignore_index` take no part. rows, ce_weights, z_weights and kl_weights hold one number a
    segment; the teacher z_T (segment 0) is a constant to the KL. scale: 0-d on the same device,
    not differentiated, such as 1 / valid tokens.

    Gradients are made in the forward pass, if one is needed, and multiplied by the upstream
    gradient in the backward pass. That of hidden is this rank's partial sum over its share of the
    vocabulary: the caller sums it over the ranks. That of weight is accumulated in fp32. fp16
    gradients stay fp32 until the upstream gradient, which carries the loss scale, is known.

    A target that no rank owns makes the loss and all gradients NaN, without waiting for the
    device. `check_targets` waits for every chunk and raises ValueError instead.
    chunk_tokens: tokens a chunk; by default as many as keep a segment's logits in CHUNK_BYTES.

    Raises ValueError where shapes, dtypes, rows or weights do not fit.
    """
    vocab = vocab or VocabShard(0, weight.shape[0])
    _check(hidden, weight, targets, scale, vocab)
    _check_segments(hidden, rows, (ce_weights, z_weights, kl_weights), shared_tokens, temperature)
    groups = len(rows) if shared_tokens else 1
    tokens = hidden.shape[0] // groups
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def per_row(values: Sequence[float]) -> Tensor:
        spread = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        for segment, value in zip(spread.split(list(rows)), values, strict=True):
            segment.fill_(value)  # no copy from the host, which would wait for the device
        return spread.view(groups, tokens)

    if chunk_tokens is None:
        chunks = math.ceil(tokens / default_chunk_tokens(weight.shape[0], dtype.itemsize))
        chunk_tokens = math.ceil(tokens / max(1, chunks)) or 1  # all of about the same size
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    plan = Plan(
        ce=per_row(ce_weights),
        z=per_row(z_weights),
        kl=per_row(kl_weights),
        students=tuple(value != 0 for value in kl_weights[:groups]),
        temperature=temperature,
        shared=shared_tokens,
        ignore_index=ignore_index,
        vocab=vocab,
        chunk=chunk_tokens,
        check_targets=check_targets,
    )
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return LossOutput(*_Loss.apply(hidden, weight, targets, scale, plan))
    with torch.no_grad():
        return _run(hidden, weight, targets, scale, plan, (False, False))[0]


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, vocab: VocabShard
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [R, D] and [V, D]"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must share a floating dtype"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets {list(targets.shape)} {targets.dtype} must be {hidden.shape[0]} ids in int64"
        )
    if scale.dim() != 0:
        raise ValueError(f"scale {list(scale.shape)} must be a tensor without dimensions")
    if not 0 <= vocab.size <= weight.shape[0] or vocab.offset < 0:
        raise ValueError(f"{vocab} does not fit a weight of {weight.shape[0]} rows")


def _check_segments(
    hidden: Tensor,
    rows: Sequence[int],
    weights: tuple[Sequence[float], ...],
    shared_tokens: bool,
    temperature: float,
) -> None:
    if not rows or sum(rows) != hidden.shape[0] or any(count < 0 for count in rows):
        raise ValueError(f"rows {list(rows)} must sum to the {hidden.shape[0]} rows of hidden")
    if any(len(values) != len(rows) for values in weights):
        raise ValueError(
            f"ce_weights, z_weights and kl_weights hold {[len(w) for w in weights]} numbers; each "
            f"needs one for each of the {len(rows)} segments"
        )
    if shared_tokens and len(set(rows)) > 1:
        raise ValueError(f"rows {list(rows)} must be equal where the segments share their tokens")
    kl_weights = weights[2]
    if any(kl_weights[:1] if shared_tokens else kl_weights):
        raise ValueError(
            f"kl_weights {list(kl_weights)}: segment 0 is the teacher and has none; without shared "
            "tokens nobody has a teacher, and all must be 0"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, plan: Plan
    ) -> LossOutput:
        needs = ctx.needs_input_grad[:2]
        output, d_hidden, d_weight = _run(hidden, weight, targets, scale, plan, needs)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*(field for field in output[1:] if field is not None))
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_total is None:
            return (None,) * 5
        d_hidden, d_weight = (
            None if kept is None else (kept * d_total).to(ctx.dtype) for kept in ctx.saved_tensors
        )
        return d_hidden, d_weight, None, None, None


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    plan: Plan,
    needs: tuple[bool, bool],
) -> tuple[LossOutput, Tensor | None, Tensor | None]:
    """The losses, and scale * d hidden and scale * d weight where `needs` asks for them."""
    (groups, tokens), dtype, d_model = plan.ce.shape, plan.ce.dtype, hidden.shape[1]
    kept_dtype = dtype if hidden.dtype == torch.float16 else hidden.dtype
    # A GEMM of low-precision operands with an fp32 result exists on CUDA only.
    operand_dtype = hidden.dtype if hidden.is_cuda else dtype
    w = weight[: plan.vocab.size].to(operand_dtype)
    h_all = hidden.reshape(groups, tokens, d_model)
    y_all = targets.reshape(groups, tokens)
    d_hidden = torch.empty_like(h_all, dtype=kept_dtype) if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    rows = RowResults(*(torch.empty_like(plan.ce, dtype=t) for t in (*[dtype] * 4, torch.bool)))
    for start in range(0, tokens, plan.chunk):
        part = slice(start, start + plan.chunk)
        h = h_all[:, part].reshape(-1, d_model).to(operand_dtype)
        logits = _mm(h, w.t(), dtype)
        y = y_all[:, part]
        chunk = reduce_chunk(logits.view(*y.shape, len(w)), y, part, plan, any(needs))
        for whole, piece in zip(rows, chunk, strict=True):
            whole[:, part] = piece
        d_logits = logits.to(operand_dtype)
        if d_hidden is not None:
            d_hidden[:, part] = _mm(d_logits, w, dtype).mul_(scale).view(groups, -1, d_model)
        if d_weight is not None:
            _add_mm(d_weight[: len(w)], d_logits.t(), h)
    loss, nll, lse, kl, agrees = (field.view(-1) for field in rows)
    total = (loss.sum() * scale).to(dtype)
    output = LossOutput(total, nll, lse, kl, agrees if plan.shared else None)
    if d_weight is not None:
        d_weight = d_weight.mul_(scale).to(kept_dtype)
    return output, None if d_hidden is None else d_hidden.view_as(hidden), d_weight


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, which is fp32 where a and b are bf16 or fp16."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # autocast leaves out= alone
    return torch.mm(a, b, out_dtype=dtype)


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
