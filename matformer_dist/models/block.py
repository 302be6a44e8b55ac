"""A layer of a nested Transformer: attention, then the nested FFN, each behind a norm.

Legend: N rows that this rank holds, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matformer_dist.config import ModelConfig
from matformer_dist.models.attention import Attention
from matformer_dist.models.cache import LayerCache
from matformer_dist.models.nested_feed_forward import NestedFeedForward
from matformer_dist.models.recomputation import Again, made_again
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer, repeat_over_ranks, replicated
from matformer_dist.parallel.topology import TensorParallel


def norm(model: ModelConfig, tensor: TensorParallel) -> nn.Module:
    kind = nn.RMSNorm if model.norm == "rmsnorm" else nn.LayerNorm
    return replicated(kind(model.d_model, eps=model.norm_eps), tensor)


class Block(nn.Module):
    def __init__(
        self,
        name: str,
        model: ModelConfig,
        nesting: Nesting,
        init: Initializer,
        tensor: TensorParallel,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.attention_norm = norm(model, tensor)
        self.attention = Attention(f"{name}.attention", model, init, tensor)
        self.ffn_norm = norm(model, tensor)
        self.ffn = NestedFeedForward(f"{name}.ffn", model, nesting, init, tensor)

    def forward(
        self,
        x: Tensor,
        positions: int,
        rotation: Rotation | None,
        rows: Sequence[int],
        widths: Sequence[int],
        repeat: int = 1,
        cache: LayerCache | None = None,
        selective: bool = False,
    ) -> Tensor:
        """x [N, D] -> [repeat * N, D]; rows are repeated between attention and FFN.

        positions: rows of a sample. selective: norms and rotations are made again in the backward
        pass, and not kept.
        """
        attention = partial(
            self.attention, positions=positions, rotation=rotation, cache=cache, selective=selective
        )
        x = x + _behind(self.attention_norm, attention, x, selective)
        x = repeat_over_ranks(x, repeat, self.tensor) if repeat > 1 else x
        ffn = partial(self.ffn, rows=rows, widths=widths)
        return x + _behind(self.ffn_norm, ffn, x, selective)

    def compile_parts(self) -> None:
        """torch.compile where `selective` leaves it nothing to keep (see recomputation.py)."""
        for one in (self.attention_norm, self.ffn_norm):
            one.compile()
        self.attention.turned = torch.compile(self.attention.turned)


def _behind(
    norm: nn.Module, sublayer: Callable[[Tensor], Tensor], x: Tensor, selective: bool
) -> Tensor:
    """sublayer(norm(x)); selective: of the norm, x alone is kept."""
    if not selective:
        return sublayer(norm(x))
    normed = checkpoint(norm, x, use_reentrant=False, preserve_rng_state=False)
    with made_again(Again(normed, partial(norm, x.detach()))):
        return sublayer(normed)
