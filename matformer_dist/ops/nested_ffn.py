"""The nested feed-forward of several granularities in one pass (paper sec. 3.1).

Legend: R rows, D d_model, F neurons, k input weights of a neuron (2 for swiglu: gate and up;
1 for gelu), m width of a segment, P rows that use a ring.

A neuron is a row of every weight, so a granularity is a contiguous prefix of rows of both, and its
input weights are one GEMM operand [k*m, D] whose outputs are interleaved: gate0, up0, gate1, ...
Input biases, where there are some, lie in the same order, so that a granularity's are the first k*m
of them, and the GEMM adds them.

Rows of x come in segments, widest first. Work is sum_i R_i * m_i, without masks:
    forward, dX    one GEMM a segment, on a prefix of the weights
    dW             one GEMM a ring: ring [m_{i-1}, m_i) is used by the first P_i rows
    db             one sum over rows a ring
Both views of the same activations need one row stride. So the saved pre-activations are ragged
(segment after segment, no gaps), and only the two temporaries of the backward pass that feed dW
have the widest segment's row stride; what lies right of a narrower segment is never touched. The
activation of all segments is one launch either way, and made again in the backward pass instead of
being kept (see nested_activation.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from matformer_dist.ops.first_order import first_order_only
from matformer_dist.ops.native import Implementation
from matformer_dist.ops.nested_activation import activate, activate_backward

Activation = Literal["swiglu", "gelu"]
_INPUTS = {"swiglu": 2, "gelu": 1}


class Exchange(Protocol):
    """Of rows with other ranks, each of which holds an equal share of them, one rank after another.

    What is started is read after `wait`; work that is queued between goes on beside it.
    """

    @property
    def size(self) -> int: ...

    def start_gather(self, x: Tensor) -> Tensor:
        """[R / size, D] of every rank -> [R, D]."""

    def start_sum(self, y: Tensor) -> Tensor:
        """This rank's [R / size, D] of the sum of all ranks' [R, D]."""

    def wait(self, started: Tensor) -> Tensor: ...


def nested_ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    *,
    rows: Sequence[int],
    widths: Sequence[int],
    activation: Activation,
    impl: Implementation = "auto",
    exchange: Exchange | None = None,
) -> Tensor:
    """y [R, D]: for the rows x_i of segment i, act(x_i w_in[:m_i]^T + b_in[:k*m_i]) w_out[:m_i].

    x [R, D]; w_in [F, k*D], a neuron's gate weights before its up weights; w_out [F, D]; b_in
    [k*F], a neuron's gate bias before its up bias, or none. rows[i] neighbouring rows of x run at
    widths[i] neurons; rows sum to R and may be 0. Under tensor parallelism everything is local: F
    and the widths are one rank's share, y its partial sum. An output bias is the caller's to add,
    once, behind the sum over the ranks.

    Where gradients are needed the widths must not increase from segment to segment; without, any
    order works. Weights and biases beyond the widest segment get zero gradient. No double backward.
    impl: of the activation, see native.py; the GEMMs are torch's.
    exchange: x is one rank's rows [R / size, D], and its gradient too, summed over the ranks; y
    stays a partial sum of all R rows. x is gathered again in the backward pass, beside the GEMMs
    of dX, and its gradient summed beside those of dW.

    Raises ValueError where shapes, dtypes, rows or widths do not fit, RuntimeError where impl is
    "native" and there is none.
    """
    _check(x, w_in, w_out, rows, widths, activation, exchange.size if exchange else 1)
    operands = [x, w_in, w_out]
    if b_in is not None:
        _check_biases(b_in, w_in, activation)
        operands.append(b_in)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    if needs_grad and any(narrow < wide for narrow, wide in pairwise(widths)):
        raise ValueError(
            f"widths {list(widths)} must not increase where gradients are needed: lay the rows "
            "out widest granularity first, or call under torch.no_grad()"
        )
    options = tuple(rows), tuple(widths), activation, impl, exchange
    y: Tensor = _NestedFFN.apply(x, w_in, w_out, b_in, *options)
    return y


def _check(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    activation: str,
    ranks: int,
) -> None:
    if activation not in _INPUTS:
        raise ValueError(f"activation {activation!r} is unknown; use 'swiglu' or 'gelu'")
    if x.dim() != 2 or w_in.dim() != 2 or w_out.dim() != 2:
        raise ValueError(
            f"x {list(x.shape)}, w_in {list(w_in.shape)} and w_out {list(w_out.shape)} must have "
            "two dimensions each; flatten x to [rows, d_model]"
        )
    neurons, d_model = w_out.shape
    inputs = _INPUTS[activation]
    if x.shape[1] != d_model or w_in.shape != (neurons, inputs * d_model):
        raise ValueError(
            f"{activation} takes x [R, D], w_in [F, {inputs}*D], w_out [F, D]; got x "
            f"{list(x.shape)}, w_in {list(w_in.shape)}, w_out {list(w_out.shape)}"
        )
    if not (w_in.is_contiguous() and w_out.is_contiguous()):
        raise ValueError(
            f"w_in (strides {w_in.stride()}) and w_out (strides {w_out.stride()}) must be "
            "contiguous: a granularity is their first rows"
        )
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(
            f"x ({x.dtype}), w_in ({w_in.dtype}) and w_out ({w_out.dtype}) must share a dtype"
        )
    if len(rows) != len(widths) or sum(rows) != ranks * x.shape[0] or any(r < 0 for r in rows):
        raise ValueError(
            f"rows {list(rows)} must be one count for each of the widths {list(widths)} and sum "
            f"to the {ranks * x.shape[0]} rows of x"
        )
    if any(not 1 <= width <= neurons for width in widths):
        raise ValueError(f"widths {list(widths)} must lie in 1 to {neurons}, the rows of w_out")


def _check_biases(b_in: Tensor, w_in: Tensor, activation: str) -> None:
    count = _INPUTS[activation] * len(w_in)
    if b_in.shape != (count,) or b_in.dtype != w_in.dtype or not b_in.is_contiguous():
        raise ValueError(
            f"b_in {list(b_in.shape)} ({b_in.dtype}, strides {b_in.stride()}) must be contiguous "
            f"[{count}] in {w_in.dtype}: a bias for each output of w_in"
        )


class _Segment(NamedTuple):
    """Rows [start, stop) at one width; `offset` of its activations in the ragged buffer."""

    start: int
    stop: int
    width: int
    offset: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def of(self, ragged: Tensor) -> Tensor:
        """This segment's block of a ragged buffer [sum R_i*m_i, k], as [R_i, k*m_i]."""
        block = ragged[self.offset : self.offset + self.rows * self.width]
        return block.view(self.rows, -1)


def _segments(rows: Sequence[int], widths: Sequence[int]) -> list[_Segment]:
    """Segments that hold rows, neighbours of equal width merged."""
    segments: list[_Segment] = []
    start = offset = 0
    for count, width in zip(rows, widths, strict=True):
        stop = start + count
        if segments and segments[-1].width == width:
            segments[-1] = segments[-1]._replace(stop=stop)
        elif count:
            segments.append(_Segment(start, stop, width, offset))
        start, offset = stop, offset + count * width
    return segments


def _rings(segments: Sequence[_Segment]) -> Iterator[tuple[int, int, int]]:
    """(low, high, P) of each ring of neurons [low, high), which the first P rows use."""
    low = 0
    for segment in reversed(segments):
        yield low, segment.width, segment.stop
        low = segment.width


class _NestedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        rows: tuple[int, ...],
        widths: tuple[int, ...],
        activation: str,
        impl: Implementation,
        exchange: Exchange | None,
    ) -> Tensor:
        d_model, inputs = w_out.shape[1], _INPUTS[activation]
        segments = _segments(rows, widths)
        whole = exchange.wait(exchange.start_gather(x)) if exchange else x
        h = x.new_empty(sum(s.rows * s.width for s in segments), inputs)
        for s in segments:
            w, x_s = w_in[: s.width].view(-1, d_model), whole[s.start : s.stop]
            if b_in is None:
                torch.mm(x_s, w.t(), out=s.of(h))
            else:
                torch.addmm(b_in[: len(w)], x_s, w.t(), out=s.of(h))
        act = activate(h, impl)
        y = x.new_empty(whole.shape)
        for s in segments:
            torch.mm(s.of(act), w_out[: s.width], out=y[s.start : s.stop])
        # Whole weights, not slices: a saved view would keep ZeRO-3's gathered weights alive. No
        # biases: h holds them.
        ctx.save_for_backward(x, w_in, w_out, h)
        ctx.segments, ctx.impl, ctx.exchange = segments, impl, exchange
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, h = ctx.saved_tensors
        segments: list[_Segment] = ctx.segments
        exchange: Exchange | None = ctx.exchange
        needs_x, needs_in, needs_out, needs_biases = ctx.needs_input_grad[:4]
        d_model = x.shape[1]
        whole = x
        if exchange and needs_in:
            whole = exchange.start_gather(x)
        d_act = None
        if needs_x or needs_in or needs_biases:
            d_act = h.new_empty(len(h))
            for s in segments:
                torch.mm(d_y[s.start : s.stop], w_out[: s.width].t(), out=s.of(d_act))
        act, d_h = activate_backward(
            h,
            d_act,
            [s.rows for s in segments],
            [s.width for s in segments],
            wants_act=needs_out,
            impl=ctx.impl,
        )
        d_x = x.new_empty(d_y.shape) if needs_x else None
        if d_x is not None:
            for s in segments:
                w = w_in[: s.width].view(-1, d_model)
                torch.mm(d_h[s.start : s.stop, : len(w)], w, out=d_x[s.start : s.stop])
        if exchange and needs_in:
            whole = exchange.wait(whole)
        summing = exchange.start_sum(d_x) if exchange and d_x is not None else None
        d_w_in = _weight_gradient(w_in, d_h, whole, segments) if needs_in else None
        d_w_out = _weight_gradient(w_out, act, d_y, segments) if needs_out else None
        d_b_in = _bias_gradient(len(w_in), d_h, h.shape[1], segments) if needs_biases else None
        if exchange and summing is not None:
            d_x = exchange.wait(summing)
        return d_x, d_w_in, d_w_out, d_b_in, None, None, None, None, None


def _weight_gradient(
    w: Tensor, left: Tensor, right: Tensor, segments: Sequence[_Segment]
) -> Tensor:
    """d w [F, k*D] from left [R, k*widest] and right [R, D]: one GEMM a ring."""
    d_w = torch.empty_like(w)
    inputs = w.shape[1] // right.shape[1]
    for low, high, used in _rings(segments):
        ring = left[:used, inputs * low : inputs * high]
        torch.mm(ring.t(), right[:used], out=d_w[low:high].view(-1, right.shape[1]))
    d_w[segments[0].width if segments else 0 :].zero_()
    return d_w


def _bias_gradient(neurons: int, d_h: Tensor, inputs: int, segments: Sequence[_Segment]) -> Tensor:
    """d b_in [k*F] from d_h [R, k*widest]: one sum a ring, which torch accumulates in fp32."""
    d_b = d_h.new_empty(inputs * neurons)
    for low, high, used in _rings(segments):
        ring = slice(inputs * low, inputs * high)
        torch.sum(d_h[:used, ring], dim=0, out=d_b[ring])
    d_b[inputs * segments[0].width if segments else 0 :].zero_()
    return d_b
