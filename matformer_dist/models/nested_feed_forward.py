"""The nested FFN, its neurons dealt over tensor-parallel ranks.

Legend: R rows (tokens of all segments), D d_model, F d_ff, m_i width of segment i, T ranks,
k = 2 input vectors a neuron for SwiGLU (gate, up), 1 for GELU.

| operand | whole     | local       | cut                    |
|---------|-----------|-------------|------------------------|
| w_in    | [F, k * D] | [F/T, k * D] | rings dealt over ranks |
| w_out   | [F, D]    | [F/T, D]    | rings dealt over ranks |
| b_in    | [k * F]   | [k * F/T]   | rings dealt over ranks |
| b_out   | [D]       | the whole   | not                    |

A neuron is one row of both. Its local prefix of m_i / T rows is a rank's share of granularity i,
so all ranks carry equal work at every granularity. Forward all-reduces the output once for all
segments, and adds b_out behind; backward the input's gradient. With rows cut over the ranks, R/T of
them come in and go out, gathered before and scattered as they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from matformer_dist.config import ModelConfig
from matformer_dist.nesting import Nesting
from matformer_dist.ops.nested_ffn import nested_ffn
from matformer_dist.parallel.layers import (
    Initializer,
    copy_to_ranks,
    replicated_bias,
    sum_over_ranks,
)
from matformer_dist.parallel.layout import Partition
from matformer_dist.parallel.topology import TensorParallel


class NestedFeedForward(nn.Module):
    def __init__(
        self,
        name: str,
        model: ModelConfig,
        nesting: Nesting,
        init: Initializer,
        tensor: TensorParallel,
    ) -> None:
        super().__init__()
        nesting.check_dealable(tensor.size)
        self.nesting = nesting
        self.tensor = tensor
        self.activation = model.ffn
        vectors = 2 if model.ffn == "swiglu" else 1
        dealt = Partition(dim=0, blocks=nesting.rings)
        self.w_in = init.parameter(
            f"{name}.w_in",
            (nesting.d_ff, vectors * model.d_model),
            model.init_std,
            dealt,
            tensor,
        )
        self.w_out = init.parameter(
            f"{name}.w_out",
            (nesting.d_ff, model.d_model),
            model.output_std,
            dealt,
            tensor,
        )
        self.b_in = self.b_out = None
        if model.biases:
            of_inputs = Partition(dim=0, blocks=tuple(vectors * ring for ring in nesting.rings))
            size = (vectors * nesting.d_ff,)
            self.b_in = init.parameter(f"{name}.b_in", size, 0.0, of_inputs, tensor)
            self.b_out = replicated_bias(f"{name}.b_out", model.d_model, init, tensor)

    def forward(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """x [R, D] -> [R, D]; segment i is the next rows[i] rows, run at widths[i] neurons.

        With rows cut over the ranks x is this one's [R/T, D]; `rows` count all.
        """
        assert set(widths) <= set(self.nesting.widths), "submodels come from this nesting"
        local_widths = [width // self.tensor.size for width in widths]
        y = nested_ffn(
            x if self.tensor.rows else copy_to_ranks(x, self.tensor),
            self.w_in,
            self.w_out,
            self.b_in,
            rows=rows,
            widths=local_widths,
            activation=self.activation,
            exchange=self.tensor.rows,
        )
        y = sum_over_ranks(y, self.tensor)
        return y if self.b_out is None else y + self.b_out
