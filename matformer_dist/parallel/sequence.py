"""Sequence parallelism: rows lie cut over the tensor-parallel ranks where every rank needs its own.

Legend: T ranks, R rows of all segments, D d_model.

Rank t holds rows [t R/T, (t+1) R/T) of the R rows in the order of the segments. So what a gather
puts together lies in that order at once, as the nested FFN, attention and the head want it: no
row is moved beside the exchange itself. A rank's rows may begin and end within a sequence, which
norms and residual sums do not see.

| function    | local -> local            | forward        | backward                            |
|-------------|---------------------------|----------------|-------------------------------------|
| gather_rows | [R/T, D] -> [R, D]        | all-gather     | reduce-scatter                      |
| sum_rows    | [R, D] -> [R/T, D]        | reduce-scatter | all-gather                          |
| repeat_rows | [R/T, D] -> [n R/T, D]    | all-gather     | reduce-scatter                      |
| gathered_linear | [R/T, in] -> [R, out/T] | all-gather   | all-gather of x beside dX's GEMM,   |
|             |                           |                | reduce-scatter of dX beside dW's    |

The collectives are torch's functional ones: they start at once and give their values to whoever
waits, on CPU and CUDA, and torch.compile takes them into its graph. (Megatron-Core's allocate on
CUDA.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class RowExchange:
    """Rows to and from `size` ranks of a process group. What is started is read after `wait`."""

    size: int
    group_name: str

    def start_gather(self, x: Tensor) -> Tensor:
        """x [R/T, ...] of every rank to [R, ...], in the order of the ranks."""
        return _collectives.all_gather_into_tensor(x.contiguous(), self.size, self.group_name)

    def start_sum(self, y: Tensor) -> Tensor:
        """This rank's [R/T, ...] of the sum of all ranks' y [R, ...]."""
        if y.shape[0] % self.size:
            raise ValueError(
                f"{y.shape[0]} rows do not divide over {self.size} ranks; sequence parallelism "
                f"needs a multiple of {self.size}"
            )
        return _collectives.reduce_scatter_tensor(y.contiguous(), "sum", self.size, self.group_name)

    def wait(self, started: Tensor) -> Tensor:
        return _collectives.wait_tensor(started)

    def gather(self, x: Tensor) -> Tensor:
        return self.wait(self.start_gather(x))

    def sum(self, y: Tensor) -> Tensor:
        return self.wait(self.start_sum(y))

    def total(self, value: Tensor) -> Tensor:
        """The sum of all ranks' values, on every rank."""
        return self.wait(_collectives.all_reduce(value, "sum", self.group_name))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(x)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.sum(d_whole), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum(y)

    @staticmethod
    def backward(ctx: Any, d_part: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gather(d_part), None


class _GatheredLinear(torch.autograd.Function):
    """Keeps the rank's own rows of x alone, and gathers them again for dW."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(x, weight)
        return exchange.gather(x) @ weight.t()

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange: RowExchange = ctx.exchange
        x, weight = ctx.saved_tensors
        gathering = exchange.start_gather(x)
        d_x = d_y @ weight
        whole = exchange.wait(gathering)
        summing = exchange.start_sum(d_x)
        d_weight = d_y.t() @ whole
        return exchange.wait(summing), d_weight, None


def gather_rows(x: Tensor, exchange: RowExchange) -> Tensor:
    return _GatherRows.apply(x, exchange)


def sum_rows(y: Tensor, exchange: RowExchange) -> Tensor:
    return _SumRows.apply(y, exchange)


def gathered_linear(x: Tensor, weight: Tensor, exchange: RowExchange) -> Tensor:
    return _GatheredLinear.apply(x, weight, exchange)


def repeat_rows(x: Tensor, times: int, exchange: RowExchange, rank: int) -> Tensor:
    """This rank's part of all R rows repeated `times`: other rows than those that it held."""
    whole = gather_rows(x, exchange)
    rows = whole.shape[0]
    start, missing = rank * times * x.shape[0], times * x.shape[0]
    parts = []
    while missing:
        first = start % rows
        parts.append(whole[first : min(first + missing, rows)])
        start, missing = start + len(parts[-1]), missing - len(parts[-1])
    return torch.cat(parts)


def sum_gradients(weights: Iterable[nn.Parameter], exchange: RowExchange) -> None:
    """Sum the gradients of replicated weights over the ranks, each of which has those of its own
    rows alone.

    Before they are accumulated, so that DeepSpeed meets the sums at every ZeRO stage: one small
    all-reduce a weight and micro-batch.
    """

    def over_ranks(gradient: Tensor) -> Tensor:
        return exchange.total(gradient.float()).to(gradient.dtype)

    for parameter in weights:
        parameter.register_hook(over_ranks)
