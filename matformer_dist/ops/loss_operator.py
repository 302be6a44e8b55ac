"""One pass over the head for the losses of all granularities, as one operator of torch.

Legend: R rows, D d_model, V rows of the head on this rank, G rows of one token, n tokens, c tokens
of a chunk, T tensor-parallel ranks.

Segments lie widest first. With `shared_tokens` row j of every segment is the same token, so a
chunk takes a range of tokens with all their G rows, and segment 0 (XL) teaches the others.
Otherwise G = 1 and a chunk is a range of rows.

A chunk's logits are made, reduced to a few numbers a row, overwritten by their gradient and
multiplied into the gradients of hidden and weight: they never live beyond the chunk. Nothing waits
for the device.

Under vocab parallelism a gather joins the ranks' numbers. A chunk goes in halves then: the first
one's gather runs beside the second one's logits, the second one's beside the first one's
gradients. Both lie in the one buffer of the chunk, so memory is the same, and the weight's
gradient still takes one product a chunk.

The GEMMs are torch's; what lies between them is compiled, or plain torch (head_chunk.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from matformer_dist.chunks import chunk_parts
from matformer_dist.ops import head_chunk, vocab_shard
from matformer_dist.ops.first_order import first_order_only
from matformer_dist.ops.head_chunk import packed
from matformer_dist.ops.vocab_shard import VocabShard


@dataclass(frozen=True)
class _Begun:
    """Rows of the tokens `part` whose numbers are on their way to all ranks."""

    part: slice
    logits: Tensor  # [G, c, V]
    targets: Tensor  # [G, c]
    numbers: Callable[[], Tensor]  # waits for those of all ranks


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the values: weights of the rows [G, n] and options."""

    ce: Tensor
    z: Tensor
    kl: Tensor
    distills: bool
    temperature: float
    shared: bool
    ignore_index: int
    vocab: VocabShard
    check_targets: bool
    compiled: bool

    @property
    def twins(self) -> Any:
        return torch.ops.matformer_dist if self.compiled else head_chunk

    def begin(self, logits: Tensor, targets: Tensor, part: slice) -> _Begun:
        """Reduce logits [G, c, V] to numbers and start to gather these."""
        local = self.twins.chunk_statistics(
            logits, targets, self.vocab.offset, self.temperature, self.distills, self.shared
        )
        gather = self.vocab.gather
        numbers = gather(local.flatten(0, 1)) if gather else lambda: local
        return _Begun(part, logits, targets, numbers)

    def finish_(self, begun: _Begun, gradient: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Results of the rows; their logits become their gradient if asked."""
        targets = begun.targets
        ranks = begun.numbers().view(-1, *targets.shape, len(head_chunk.LocalNumbers._fields))
        if self.check_targets:
            self._refuse_unowned(targets, ranks)
        weights = (w[:, begun.part].contiguous() for w in (self.ce, self.z, self.kl))
        return self.twins.chunk_gradient_(
            begun.logits, targets, ranks, *weights, self.vocab.offset, self.ignore_index,
            self.temperature, self.distills, gradient,
        )  # fmt: skip

    def _refuse_unowned(self, targets: Tensor, ranks: Tensor) -> None:
        at_target = head_chunk.LocalNumbers(*ranks.unbind(-1)).target.amax(0)
        unowned = targets[(targets != self.ignore_index) & (at_target == -torch.inf)]
        if len(unowned):
            raise ValueError(f"targets {unowned[:5].tolist()} are not ids of the vocabulary")


def compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    rows: Sequence[int],
    ce_weights: Sequence[float],
    z_weights: Sequence[float],
    kl_weights: Sequence[float],
    shared_tokens: bool,
    temperature: float,
    ignore_index: int,
    shard: int,
    chunk_tokens: int,
    check_targets: bool,
    compiled: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LossOutput's fields, and the gradients of total / scale.

    `shard` is the key of a VocabShard, the rest as in multi_granularity_loss. A gradient that is
    not needed is an empty tensor.
    """
    groups = len(rows) if shared_tokens else 1
    h = hidden.reshape(groups, -1, hidden.shape[1])
    y = targets.reshape(groups, -1)
    dtype, kept_dtype = arithmetic_dtypes(hidden)
    # A GEMM of low-precision operands with an fp32 result exists on CUDA only.
    operand_dtype = hidden.dtype if hidden.is_cuda else dtype
    # Shares of a large vocabulary are nothing in fp16, until they are lifted.
    lift = 1024.0 if operand_dtype == torch.float16 else 1.0

    def per_row(values: Sequence[float]) -> Tensor:
        spread = targets.new_empty(targets.shape, dtype=dtype)
        for segment, value in zip(spread.split(list(rows)), values, strict=True):
            segment.fill_(value * lift)  # no copy from the host, which would wait for the device
        return spread.view(y.shape)

    plan = _Plan(
        ce=per_row(ce_weights),
        z=per_row(z_weights),
        kl=per_row(kl_weights),
        distills=any(kl_weights),
        temperature=temperature,
        shared=shared_tokens,
        ignore_index=ignore_index,
        vocab=vocab_shard.find(shard, weight.shape[0]),
        check_targets=check_targets,
        compiled=compiled,
    )
    w = weight[: plan.vocab.size].to(operand_dtype)
    d_hidden = h.new_empty(h.shape, dtype=kept_dtype) if needs_hidden else None
    d_weight = w.new_zeros(weight.shape, dtype=dtype) if needs_weight else None
    results, best = _over_chunks(plan, h, w, y, chunk_tokens, d_hidden, d_weight)
    if lift != 1:
        for lifted in (results[0], d_hidden, d_weight):
            if lifted is not None:
                lifted.div_(lift)
    loss, nll, lse, kl = results.flatten(1)
    nothing = hidden.new_empty(0, dtype=kept_dtype)
    return (
        (loss.sum() * scale).to(dtype),
        nll.clone(),  # an operator's results must not share memory
        lse.clone(),
        kl.clone(),
        best.view(-1),
        nothing if d_hidden is None else d_hidden.view_as(hidden),
        nothing.clone() if d_weight is None else d_weight.to(kept_dtype),
    )


def _over_chunks(
    plan: _Plan,
    hidden: Tensor,
    w: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fills d_hidden [G, n, D] and adds to d_weight [V, D], from hidden, w and targets [G, n].

    Returns loss, nll, lse and kl of the rows [4, G, n], and their best ids [G, n]. The operands of
    the GEMMs have the dtype of w, the logits that of plan's weights.
    """
    (groups, tokens, d_model), dtype = hidden.shape, plan.ce.dtype
    results = hidden.new_empty(4, groups, tokens, dtype=dtype)
    best = torch.empty_like(targets)
    gradient = None if d_hidden is None and d_weight is None else w.dtype
    # One buffer for the logits of all chunks: on a CPU a fresh one is paid for page by page.
    buffer = results.new_empty(groups * min(chunk_tokens, tokens), len(w))
    for parts in chunk_parts(tokens, chunk_tokens, halves=plan.vocab.gather is not None):
        h = _rows_of(hidden, parts, w.dtype)
        begun, rows = [], 0
        for part in parts:
            y = targets[:, part].contiguous()
            taken = slice(rows, rows + y.numel())
            logits = _mm(h[taken], w.t(), out=buffer[taken])
            begun.append(plan.begin(logits.view(*y.shape, len(w)), y, part))
            rows = taken.stop
        for one in begun:
            results[:, :, one.part], best[:, one.part] = plan.finish_(one, gradient)
            if d_hidden is not None:
                d_logits = packed(one.logits.flatten(0, 1), w.dtype)
                d_h = _mm(d_logits, w, out=results.new_empty(len(d_logits), d_model))
                d_hidden[:, one.part] = d_h.view(groups, -1, d_model)
        if d_weight is not None:
            _add_mm(d_weight[: len(w)], packed(buffer[:rows], w.dtype).t(), h)
    return results, best


def _rows_of(hidden: Tensor, parts: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """hidden [G, n, D] of neighbouring parts as rows [G * c, D], part after part."""
    d_model = hidden.shape[2]
    if len(hidden) == 1 or len(parts) == 1:
        whole = hidden[:, parts[0].start : parts[-1].stop]
        return whole.reshape(-1, d_model).to(dtype)
    return torch.cat([hidden[:, part].reshape(-1, d_model) for part in parts]).to(dtype)


def arithmetic_dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the arithmetic, and of gradients until the upstream gradient is known."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return dtype, dtype if hidden.dtype == torch.float16 else hidden.dtype


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the dtype of out, which is fp32 where a and b are bf16 or fp16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)  # autocast leaves out= alone
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


operator = torch.library.custom_op(
    "matformer_dist::multi_granularity_loss", compute, mutates_args=()
)


@operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    dtype, kept_dtype = arithmetic_dtypes(hidden)
    needs_hidden, needs_weight = options[-2:]
    nll, lse, kl = (targets.new_empty(targets.shape, dtype=dtype) for _ in range(3))
    return (
        scale.new_empty((), dtype=dtype),
        nll,
        lse,
        kl,
        targets.new_empty(targets.shape),
        hidden.new_empty(hidden.shape if needs_hidden else 0, dtype=kept_dtype),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=kept_dtype),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scale = inputs[3]
    ctx.save_for_backward(scale, *output[-2:])
    ctx.needs, ctx.dtype, ctx.without = inputs[-2:], inputs[0].dtype, (None,) * len(inputs[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_order_only
def _scale_gradients(ctx: Any, d_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_total is None:
        return None, None, *ctx.without
    scale, *kept = ctx.saved_tensors
    factor = d_total * scale
    gradients = [
        (gradient * factor).to(ctx.dtype) if needed else None
        for gradient, needed in zip(kept, ctx.needs, strict=True)
    ]
    return *gradients, *ctx.without


operator.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@register_flop_formula(torch.ops.matformer_dist.multi_granularity_loss)  # type: ignore[untyped-decorator]
def _flops(hidden: Sequence[int], weight: Sequence[int], *options: Any, **_: Any) -> int:
    """Of the GEMMs: logits, and as many again for each gradient. Shapes stand for tensors."""
    shard, needs_hidden, needs_weight = options[9], *options[13:15]
    size = vocab_shard.find(shard, weight[0]).size
    return 2 * math.prod(hidden) * size * (1 + needs_hidden + needs_weight)
