"""Losses of all granularities in one pass over the head.

Legend: R rows, D d_model, V rows of the head on this rank, G rows of one token, n tokens, c tokens
of a chunk, T tensor-parallel ranks.

Segments lie widest first. With `shared_tokens` row j of every segment is the same token, so a
chunk takes a range of tokens with all their G rows, and segment 0 (XL) teaches the others.
Otherwise G = 1 and a chunk is a range of rows.

A chunk's logits are made, reduced to a few numbers a row, overwritten by their gradient and
multiplied into the gradients of hidden and weight: they never live beyond the chunk. Under vocab
parallelism one gather a chunk joins the ranks' numbers. Nothing waits for the device.

The GEMMs are torch's; what lies between them is compiled, or plain torch (head_chunk.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from matformer_dist.ops import head_chunk, native
from matformer_dist.ops.first_order import first_order_only
from matformer_dist.ops.head_chunk import packed
from matformer_dist.ops.native import Implementation

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Logits of one segment in one chunk. Not of all segments: the number of chunks, hence of
collectives, is that of a step of XL alone, whatever the number of granularities. A CPU wants them
near its caches; a GPU wants chunks so long that adding them to the weight's gradient, which moves
all of it each time, is little beside the GEMM."""

_shards: WeakValueDictionary[int, VocabShard] = WeakValueDictionary()
_keys = itertools.count()
_WHOLE = -1  # instead of a key: all rows of the weight, on one rank


@dataclass(frozen=True, eq=False)
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
    # An operator takes no function, so it is told where to find it.
    key: int = field(default_factory=_keys.__next__, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.offset < 0 or self.size < 0:
            raise ValueError(f"{self} must not hold negative numbers")
        _shards[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return VocabShard, (self.offset, self.size, self.gather)  # under a key of its own

    def __deepcopy__(self, _: Any) -> VocabShard:
        return self  # it does not change, and a process group cannot be copied


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


def default_chunk_tokens(local_vocab: int, device: str, itemsize: int = 4) -> int:
    """Most tokens of a chunk, for a weight of `local_vocab` rows and logits of `itemsize` bytes.

    The same on all ranks, whose weights have the same number of rows, padding included. device: a
    type, such as cuda.
    """
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    return max(1, budget // (max(1, local_vocab) * itemsize))


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
    impl: Implementation = "auto",
) -> LossOutput:
    """scale * sum over rows r of ce CE_r + z LSE_r^2 + kl tau^2 KL(softmax(z_T/tau) || ...r/tau).

    hidden [R, D]; weight [V, D], this rank's rows of the head; targets [R] int64 global ids, rows
    with `ignore_index` take no part. rows, ce_weights, z_weights and kl_weights hold one number a
    segment; the teacher z_T (segment 0) is a constant to the KL. scale: 0-d on the same device,
    not differentiated, such as 1 / valid tokens.

    Gradients are made in the forward pass, if one is needed, and multiplied by the upstream
    gradient in the backward pass. That of hidden is this rank's partial sum over its share of the
    vocabulary: the caller sums it over the ranks. That of weight is accumulated in fp32. fp16
    gradients stay fp32 until the upstream gradient, which carries the loss scale, is known. No
    double backward, no forward-mode derivatives.

    A target that no rank owns makes the loss and all gradients NaN, without waiting for the
    device. `check_targets` waits for every chunk and raises ValueError instead.
    chunk_tokens: tokens a chunk; by default as many as keep a segment's logits in CHUNK_BYTES.
    impl: see native.py. To torch.compile the whole is one operator.

    Raises ValueError where shapes, dtypes, devices, rows or weights do not fit, RuntimeError where
    impl is "native" and there is none.
    """
    _check(hidden, weight, targets, scale, vocab)
    _check_segments(hidden, rows, (ce_weights, z_weights, kl_weights), shared_tokens, temperature)
    dtype, _ = _dtypes(hidden)
    tokens = rows[0] if shared_tokens else hidden.shape[0]
    if chunk_tokens is None:
        most = default_chunk_tokens(weight.shape[0], hidden.device.type, dtype.itemsize)
        chunks = max(1, math.ceil(tokens / most))
        chunk_tokens = math.ceil(tokens / chunks) or 1  # all of about the same size
    elif not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be a whole number from 1")
    learns = torch.is_grad_enabled()
    total, nll, lse, kl, agrees, _, _ = torch.ops.matformer_dist.multi_granularity_loss(
        hidden,
        weight,
        targets,
        scale,
        list(rows),
        [float(w) for w in ce_weights],
        [float(w) for w in z_weights],
        [float(w) for w in kl_weights],
        shared_tokens,
        float(temperature),
        ignore_index,
        _WHOLE if vocab is None else vocab.key,
        chunk_tokens,
        check_targets,
        native.is_native(impl, hidden.device, dtype),
        learns and hidden.requires_grad,
        learns and weight.requires_grad,
    )
    return LossOutput(total, nll, lse, kl, agrees if shared_tokens else None)


def _shard(key: int, weight_rows: int) -> VocabShard:
    return VocabShard(0, weight_rows) if key == _WHOLE else _shards[key]


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, vocab: VocabShard | None
) -> None:
    if not isinstance(scale, Tensor):
        raise ValueError(f"scale is {scale!r}; it must be a tensor without dimensions")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [R, D] and [V, D]"
        )
    if not weight.numel():
        raise ValueError(f"weight {list(weight.shape)} must not be empty")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must share a floating dtype"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets {list(targets.shape)} {targets.dtype} must be {hidden.shape[0]} ids in int64"
        )
    if len({t.device for t in (hidden, weight, targets, scale)}) > 1:
        raise ValueError(
            f"hidden ({hidden.device}), weight ({weight.device}), targets ({targets.device}) and "
            f"scale ({scale.device}) must lie on one device"
        )
    if scale.dim() != 0:
        raise ValueError(f"scale {list(scale.shape)} must be a tensor without dimensions")
    if vocab and not 0 <= vocab.size <= weight.shape[0]:
        raise ValueError(f"{vocab} does not fit a weight of {weight.shape[0]} rows")


def _check_segments(
    hidden: Tensor,
    rows: Sequence[int],
    weights: tuple[Sequence[float], ...],
    shared_tokens: bool,
    temperature: float,
) -> None:
    if not all(isinstance(count, int) for count in rows):
        raise ValueError(f"rows {list(rows)} must be whole numbers")
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
    if not all(math.isfinite(value) for values in weights for value in values):
        raise ValueError(f"ce_weights, z_weights and kl_weights {weights} must be finite")
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"temperature is {temperature}; it must lie in 1e-6 to 1e6")


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

    def reduce_(
        self, logits: Tensor, targets: Tensor, part: slice, gradient: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Results of a chunk's rows; its logits [G, c, V] become their gradient if asked."""
        twins: Any = torch.ops.matformer_dist if self.compiled else head_chunk
        offset, distills, temperature = self.vocab.offset, self.distills, self.temperature
        local = twins.chunk_statistics(logits, targets, offset, temperature, distills, self.shared)
        gather = self.vocab.gather
        ranks = gather(local.flatten(0, 1)) if gather else local
        ranks = ranks.view(-1, *local.shape)
        if self.check_targets:
            self._refuse_unowned(targets, ranks)
        weights = (w[:, part].contiguous() for w in (self.ce, self.z, self.kl))
        return twins.chunk_gradient_(
            logits, targets, ranks, *weights, offset, self.ignore_index, temperature, distills,
            gradient,
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
    """What the operator does: LossOutput's fields, and the gradients of total / scale.

    `shard` is the key of a VocabShard, the rest as in multi_granularity_loss. A gradient that is
    not needed is an empty tensor.
    """
    groups = len(rows) if shared_tokens else 1
    tokens, d_model = hidden.shape[0] // groups, hidden.shape[1]
    dtype, kept_dtype = _dtypes(hidden)

    # A GEMM of low-precision operands with an fp32 result exists on CUDA only.
    operand_dtype = hidden.dtype if hidden.is_cuda else dtype
    gradient = operand_dtype if needs_hidden or needs_weight else None
    # Shares of a large vocabulary are nothing in fp16, until they are lifted.
    lift = 1024.0 if operand_dtype == torch.float16 else 1.0

    def per_row(values: Sequence[float]) -> Tensor:
        spread = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        for segment, value in zip(spread.split(list(rows)), values, strict=True):
            segment.fill_(value * lift)  # no copy from the host, which would wait for the device
        return spread.view(groups, tokens)

    plan = _Plan(
        ce=per_row(ce_weights),
        z=per_row(z_weights),
        kl=per_row(kl_weights),
        distills=any(kl_weights),
        temperature=temperature,
        shared=shared_tokens,
        ignore_index=ignore_index,
        vocab=_shard(shard, weight.shape[0]),
        check_targets=check_targets,
        compiled=compiled,
    )
    w = weight[: plan.vocab.size].to(operand_dtype)
    h_all = hidden.reshape(groups, tokens, d_model)
    y_all = targets.reshape(groups, tokens)
    results = h_all.new_empty(4, groups, tokens, dtype=dtype)
    agrees = y_all.new_empty(groups, tokens, dtype=torch.bool)
    d_hidden = results.new_empty(h_all.shape, dtype=kept_dtype) if needs_hidden else None
    d_weight = results.new_zeros(weight.shape) if needs_weight else None
    # One buffer for the logits of all chunks: on a CPU a fresh one is paid for page by page.
    buffer = logits = d_logits = results.new_empty(groups * min(chunk_tokens, tokens), len(w))
    for start in range(0, tokens, chunk_tokens):
        part = slice(start, start + chunk_tokens)
        h = h_all[:, part].reshape(-1, d_model).to(operand_dtype)
        y = y_all[:, part].contiguous()
        logits = _mm(h, w.t(), out=buffer[: len(h)])
        results[:, :, part], agrees[:, part] = plan.reduce_(
            logits.view(*y.shape, len(w)), y, part, gradient
        )
        d_logits = packed(logits, operand_dtype)
        if d_hidden is not None:
            d_h = _mm(d_logits, w, out=results.new_empty(len(h), d_model))
            d_hidden[:, part] = d_h.view(groups, -1, d_model)
        if d_weight is not None:
            _add_mm(d_weight[: len(w)], d_logits.t(), h)
    if lift != 1:
        for lifted in (results[0], d_hidden, d_weight):
            if lifted is not None:
                lifted.div_(lift)
    del buffer, logits, d_logits  # before the gradient of the weight is copied
    loss, nll, lse, kl = results.flatten(1)
    nothing = hidden.new_empty(0, dtype=kept_dtype)
    return (
        (loss.sum() * scale).to(dtype),
        nll.clone(),  # an operator's results must not share memory
        lse.clone(),
        kl.clone(),
        agrees.view(-1),
        nothing if d_hidden is None else d_hidden.view_as(hidden),
        nothing.clone() if d_weight is None else d_weight.to(kept_dtype),
    )


def _dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
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


_operator = torch.library.custom_op(
    "matformer_dist::multi_granularity_loss", compute, mutates_args=()
)


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    dtype, kept_dtype = _dtypes(hidden)
    needs_hidden, needs_weight = options[-2:]
    nll, lse, kl = (targets.new_empty(targets.shape, dtype=dtype) for _ in range(3))
    return (
        scale.new_empty((), dtype=dtype),
        nll,
        lse,
        kl,
        targets.new_empty(targets.shape, dtype=torch.bool),
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


_operator.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@register_flop_formula(torch.ops.matformer_dist.multi_granularity_loss)  # type: ignore[untyped-decorator]
def _flops(hidden: Sequence[int], weight: Sequence[int], *options: Any, **_: Any) -> int:
    """Of the GEMMs: logits, and as many again for each gradient. Shapes stand for tensors."""
    shard, needs_hidden, needs_weight = options[9], *options[13:15]
    size = _shard(shard, weight[0]).size
    return 2 * math.prod(hidden) * size * (1 + needs_hidden + needs_weight)
