"""Linear maps and lookups over weights that are cut over tensor-parallel ranks.

Legend: T ranks, D d_model, V vocabulary, N rows.  `x -> y` names local shapes.  Where rows are cut
over the ranks (`tensor.rows`, see sequence.py), N rows outside are N/T of them.

| function            | weight, local | forward            | who reduces (forward / backward)  |
|---------------------|---------------|--------------------|-----------------------------------|
| column_linear       | [out/T, in]   | [N, in] -> [N, out/T] | nobody / dX, overlapped with dW |
| row_linear          | [out, in/T]   | [N, in/T] -> [N, out] | y / nobody                      |
| VocabParallelEmbedding | [V/T, D]   | ids [..] -> [.., D]   | y / nobody                      |
| copy_to_ranks       | -             | [N, in] -> [N, in]    | nobody / dX                     |
| sum_over_ranks      | -             | [N, out] -> [N, out]  | y / nobody                      |

With cut rows, "nobody" is an all-gather and y's or dX's all-reduce a reduce-scatter; column_linear
keeps N/T rows of x and gathers them again for dW.

The collectives are Megatron-Core's, or sequence.py's with cut rows. Megatron-Core is imported where
it is first needed, because the import takes seconds that single-process commands (extract,
generate) need not pay.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matformer_dist.parallel.layout import REPLICATED, ROWS, Partition
from matformer_dist.parallel.sequence import (
    gather_rows,
    gathered_linear,
    repeat_rows,
    sum_gradients,
    sum_rows,
)
from matformer_dist.parallel.topology import TensorParallel


def copy_to_ranks(x: Tensor, tensor: TensorParallel) -> Tensor:
    if tensor.size == 1:
        return x
    if tensor.rows:
        return gather_rows(x, tensor.rows)
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    return copy_to_tensor_model_parallel_region(x, group=tensor.group)


def sum_over_ranks(y: Tensor, tensor: TensorParallel) -> Tensor:
    if tensor.size == 1:
        return y
    if tensor.rows:
        return sum_rows(y, tensor.rows)
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    # Megatron reduces a copy of a non-contiguous input and returns the input itself.
    return reduce_from_tensor_model_parallel_region(y.contiguous(), group=tensor.group)


def column_linear(
    x: Tensor, weight: Tensor, tensor: TensorParallel, bias: Tensor | None = None
) -> Tensor:
    if tensor.size == 1:
        return F.linear(x, weight, bias)
    if tensor.rows:
        y = gathered_linear(x, weight, tensor.rows)
        return y if bias is None else y + bias
    from megatron.core.tensor_parallel.layers import (
        linear_with_grad_accumulation_and_async_allreduce,
    )

    return linear_with_grad_accumulation_and_async_allreduce(
        x,
        weight,
        bias=bias,
        gradient_accumulation_fusion=False,  # needs main_grad, which DeepSpeed does not make
        allreduce_dgrad=True,
        sequence_parallel=False,
        tp_group=tensor.group,
    )


def row_linear(x: Tensor, weight: Tensor, tensor: TensorParallel) -> Tensor:
    return sum_over_ranks(F.linear(x, weight), tensor)


def repeat_over_ranks(x: Tensor, times: int, tensor: TensorParallel) -> Tensor:
    """All rows [N, D] one time after another, [times * N, D]."""
    if tensor.rows:
        return repeat_rows(x, times, tensor.rows, tensor.rank)
    return x.repeat(times, 1)


def replicated(module: nn.Module, tensor: TensorParallel) -> nn.Module:
    """A module whose weights every rank holds, and that works on rows outside."""
    if tensor.rows:
        sum_gradients(module.parameters(), tensor.rows)
    return module


@dataclass(frozen=True)
class Initializer:
    """Weights as a pure function of (seed, name): the tensor-parallel size cannot change them.

    Without a seed, parameters are left unset, for weights that are loaded next.
    """

    seed: int | None

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        std: float,
        partition: Partition,
        tensor: TensorParallel,
    ) -> nn.Parameter:
        """This rank's piece of the weight `name`, whose whole shape is `shape`."""
        if self.seed is None:
            piece = torch.empty(partition.local_shape(shape, tensor.size))
        else:
            digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            full = torch.empty(shape).normal_(0.0, std, generator=generator)
            piece = partition.deal(full, tensor.rank, tensor.size)
        weight = nn.Parameter(piece)
        # DeepSpeed counts an unmarked weight once per group in its gradient norm.
        is_cut = tensor.size > 1 and partition.dim is not None
        weight.tensor_model_parallel = is_cut  # type: ignore[attr-defined]
        weight.partition = partition  # type: ignore[attr-defined]
        return weight


def replicated_bias(
    name: str, size: int, init: Initializer, tensor: TensorParallel
) -> nn.Parameter:
    """A bias that every rank holds, and adds to rows outside, behind their sum over the ranks."""
    bias = init.parameter(name, (size,), 0.0, REPLICATED, tensor)
    if tensor.rows:
        sum_gradients([bias], tensor.rows)
    return bias


class VocabParallelEmbedding(nn.Module):
    """Lookup of ids [N] in a table [V, D] cut by rows, as [N, D] summed over ranks.

    V need not divide by T: the last rows of the last ranks are padding, zero and never read.
    """

    def __init__(
        self, name: str, vocab_size: int, d_model: int, std: float, init: Initializer,
        tensor: TensorParallel,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tensor = tensor
        self.weight = init.parameter(f"{name}.weight", (vocab_size, d_model), std, ROWS, tensor)

    def forward(self, ids: Tensor) -> Tensor:
        if self.tensor.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.tensor.rank * self.weight.shape[0]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return sum_over_ranks(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tensor)


def vocab_shard(vocab_size: int, tensor: TensorParallel) -> tuple[int, int]:
    """(first id, number of real ids) of this rank's rows of a vocabulary table."""
    rows = -(-vocab_size // tensor.size)
    first = tensor.rank * rows
    return first, max(0, min(rows, vocab_size - first))
