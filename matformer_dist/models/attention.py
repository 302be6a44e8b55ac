"""Self-attention, causal or bidirectional, its heads cut over tensor-parallel ranks.

Legend: B sequences, s positions, N = B * s rows, D d_model, H query heads, K key-value heads,
G = H / K query heads per key-value head, h head size, T ranks.

| operand | whole               | local                 |
|---------|---------------------|-----------------------|
| w_qkv   | [K * (G + 2) * h, D] | [K/T * (G + 2) * h, D] |
| b_qkv   | [K * (G + 2) * h]   | [K/T * (G + 2) * h]   |
| w_out   | [D, H * h]          | [D, H/T * h]          |
| b_out   | [D]                 | the whole             |

Rows of w_qkv are grouped by key-value head: its G query heads, its key, its value. So a cut by
rows gives every rank whole groups, and one product makes all three. Forward all-reduces the
output, to which b_out is added behind, backward the input's gradient. With rows cut over the ranks,
N/T of them come in and go out: all are gathered for the products, and what is summed is scattered.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from matformer_dist.config import ModelConfig
from matformer_dist.models.cache import LayerCache
from matformer_dist.models.recomputation import Again, made_again
from matformer_dist.models.rotation import Rotation
from matformer_dist.parallel.layers import (
    Initializer,
    column_linear,
    replicated_bias,
    row_linear,
)
from matformer_dist.parallel.layout import COLUMNS, ROWS
from matformer_dist.parallel.topology import TensorParallel


class Attention(nn.Module):
    def __init__(
        self, name: str, model: ModelConfig, init: Initializer, tensor: TensorParallel
    ) -> None:
        super().__init__()
        self.turned = _turned
        self.tensor = tensor
        self.causal = model.causal
        self.head_dim = model.head_dim
        self.kv_heads = model.kv_heads // tensor.size
        self.queries_per_kv = model.n_heads // model.kv_heads
        rows = model.kv_heads * (self.queries_per_kv + 2) * model.head_dim
        self.w_qkv = init.parameter(
            f"{name}.w_qkv", (rows, model.d_model), model.init_std, ROWS, tensor
        )
        self.w_out = init.parameter(
            f"{name}.w_out",
            (model.d_model, model.attention_width),
            model.output_std,
            COLUMNS,
            tensor,
        )
        self.b_qkv = self.b_out = None
        if model.biases:
            self.b_qkv = init.parameter(f"{name}.b_qkv", (rows,), 0.0, ROWS, tensor)
            self.b_out = replicated_bias(f"{name}.b_out", model.d_model, init, tensor)

    def forward(
        self,
        x: Tensor,
        positions: int,
        rotation: Rotation | None,
        cache: LayerCache | None = None,
        selective: bool = False,
    ) -> Tensor:
        """x [N, D] -> [N, D], of samples of s positions; with a cache, x holds the positions behind
        those in it.

        selective: rotated queries and keys are turned again in the backward pass, and not kept.
        """
        s = positions
        groups = column_linear(x, self.w_qkv, self.tensor, self.b_qkv)
        groups = groups.view(-1, s, self.kv_heads, self.queries_per_kv + 2, self.head_dim)
        queries, keys, v = groups.split([self.queries_per_kv, 1, 1], dim=3)
        q, k = self.turned(queries, rotation), self.turned(keys, rotation)
        v = v.squeeze(3).transpose(1, 2)
        kept: AbstractContextManager[None] = nullcontext()
        if selective and rotation is not None:
            kept = made_again(
                Again(q, partial(self.turned, queries.detach(), rotation)),
                Again(k, partial(self.turned, keys.detach(), rotation)),
            )
        mask, is_causal = None, self.causal and s > 1
        if cache is not None:
            k, v = cache.append(k, v)
            mask, is_causal = cache.span.mask, cache.span.is_causal
        with kept:
            context = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal,
                enable_gqa=self.queries_per_kv > 1,
            )  # fmt: skip
        context = context.transpose(1, 2).reshape(groups.shape[0] * s, -1)
        y = row_linear(context, self.w_out, self.tensor)
        return y if self.b_out is None else y + self.b_out


def _turned(heads: Tensor, rotation: Rotation | None) -> Tensor:
    """heads [B, s, K/T, n, h] -> [B, n * K/T, s, h], rotated if there is a rotation."""
    flat = heads.flatten(2, 3)
    return (flat if rotation is None else rotation.turn(flat)).transpose(1, 2)
