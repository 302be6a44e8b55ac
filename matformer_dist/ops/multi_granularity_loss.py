"""Losses of all granularities in one pass over the head: the function, and what it refuses.

The pass itself is loss_operator.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matformer_dist.chunks import default_chunk_tokens, even_chunk_tokens
from matformer_dist.ops import native
from matformer_dist.ops.loss_operator import arithmetic_dtypes, operator
from matformer_dist.ops.native import Implementation
from matformer_dist.ops.vocab_shard import WHOLE, VocabShard


class LossOutput(NamedTuple):
    """`total` (0-d) is differentiable, the rest is detached. fp32 (fp64 for fp64 inputs).

    nll   [R] cross-entropy in nats, 0 at ignored rows
    lse   [R] log of the sum of exponentials of the logits
    kl    [R] KL(teacher || row) at the temperature, 0 at ignored rows and without distillation
    best  [R] int64, global id of the largest logit, the lowest one of equals; None unless tokens
          are shared
    """

    total: Tensor
    nll: Tensor
    lse: Tensor
    kl: Tensor
    best: Tensor | None


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
    chunk_tokens: tokens a chunk; by default as many as keep a segment's logits in
    chunks.CHUNK_BYTES.
    impl: see native.py. To torch.compile the whole is one operator.

    Raises ValueError where shapes, dtypes, devices, rows or weights do not fit, RuntimeError where
    impl is "native" and there is none.
    """
    _check(hidden, weight, targets, scale, vocab)
    _check_segments(hidden, rows, (ce_weights, z_weights, kl_weights), shared_tokens, temperature)
    dtype, _ = arithmetic_dtypes(hidden)
    tokens = rows[0] if shared_tokens else hidden.shape[0]
    if chunk_tokens is None:
        most = default_chunk_tokens(weight.shape[0], hidden.device.type, dtype.itemsize)
        chunk_tokens = even_chunk_tokens(tokens, most)
    elif not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be a whole number from 1")
    learns = torch.is_grad_enabled()
    total, nll, lse, kl, best, _, _ = operator(
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
        WHOLE if vocab is None else vocab.key,
        chunk_tokens,
        check_targets,
        native.is_native(impl, hidden.device, dtype),
        learns and hidden.requires_grad,
        learns and weight.requires_grad,
    )
    return LossOutput(total, nll, lse, kl, best if shared_tokens else None)


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
