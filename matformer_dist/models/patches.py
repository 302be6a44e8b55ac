"""From images to the rows of a vision encoder, and from its rows to one of each image.

Legend: b images, C channels, H height and width, P patch size, n = (H/P)^2 patches, s rows of an
image (its patches, behind a class token if there is one), D d_model, T tensor-parallel ranks.

All weights here are whole on every rank: they are a hundredth of a model. With cut rows (see
parallel/sequence.py) a rank makes all rows and keeps its own, and the weights' gradients are
summed over the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.parallel.layers import Initializer, sum_over_ranks
from matformer_dist.parallel.layout import REPLICATED
from matformer_dist.parallel.sequence import sum_gradients
from matformer_dist.parallel.topology import TensorParallel

_BASE = 10_000.0  # of the wave lengths of fixed positions


class PatchEmbedding(nn.Module):
    """The convolution of a ViT, as one product: weight [D, C * P * P], bias [D].

    class_token [D] is there for pooling: token; positions [s, D] where they are learned.
    """

    class_token: nn.Parameter | None
    positions: nn.Parameter | None
    fixed: Tensor | None

    def __init__(self, model: VisionModelConfig, init: Initializer, tensor: TensorParallel) -> None:
        super().__init__()
        self.model = model
        self.tensor = tensor

        def weight(name: str, shape: tuple[int, ...], std: float) -> nn.Parameter:
            return init.parameter(f"embedding.{name}", shape, std, REPLICATED, tensor)

        D, std = model.d_model, model.init_std
        self.weight = weight("weight", (D, model.patch_values), std)
        self.bias = weight("bias", (D,), 0.0)
        self.class_token = weight("class_token", (D,), std) if model.pooling == "token" else None
        self.positions = None
        fixed = None
        if model.positions == "learned":
            self.positions = weight("positions", (model.rows, D), std)
        else:
            fixed = sincos_positions(model)
        self.register_buffer("fixed", fixed, persistent=False)
        if tensor.rows:
            sum_gradients(self.parameters(), tensor.rows)

    def forward(self, images: Tensor) -> Tensor:
        """images [b, C, H, H] of any floating dtype -> rows [b * s, D], or this rank's of them."""
        model = self.model
        size = (model.channels, model.image_size, model.image_size)
        if images.dim() != 4 or images.shape[1:] != size:
            raise ValueError(
                f"images are {list(images.shape)}; this model reads [b, {size[0]}, {size[1]}, "
                f"{size[2]}]"
            )
        b, P, grid = len(images), model.patch_size, model.grid
        patches = images.to(self.weight.dtype).view(b, model.channels, grid, P, grid, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(b, grid * grid, model.patch_values)
        x = nn.functional.linear(patches, self.weight, self.bias)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(b, 1, -1), x], dim=1)
        positions = self.positions if self.positions is not None else self.fixed
        assert positions is not None
        # Whoever casts weights, as DeepSpeed does, leaves fixed positions in fp32.
        rows = (x + positions.to(x.dtype)).flatten(0, 1)
        if self.tensor.rows is None:
            return rows
        own = len(rows) // self.tensor.size
        return rows[self.tensor.rank * own : (self.tensor.rank + 1) * own]


def sincos_positions(model: VisionModelConfig) -> Tensor:
    """Sines and cosines of a patch's column, then of its row, [s, D]; zeros for a class token.

    As in big_vision and MoCo v3 (arXiv 2104.02057, appendix): D/4 wave lengths of each.
    """
    quarter = model.d_model // 4
    speeds = _BASE ** -(torch.arange(quarter) / max(1, quarter - 1))
    y, x = torch.meshgrid(torch.arange(model.grid), torch.arange(model.grid), indexing="ij")
    angles = [axis.flatten()[:, None] * speeds for axis in (x, y)]
    found = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
    token = found.new_zeros(model.rows - len(found), model.d_model)
    return torch.cat([token, found])


def pool(x: Tensor, model: VisionModelConfig, tensor: TensorParallel) -> Tensor:
    """Rows [B * s, D], or this rank's of them -> [B, D], whole: the class token's, or the mean."""
    s = model.rows
    if tensor.rows is None:
        of_image = x.view(-1, s, x.shape[1])
        return of_image[:, 0] if model.pooling == "token" else of_image.mean(dim=1)
    place = torch.arange(len(x), device=x.device) + tensor.rank * len(x)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    if model.pooling == "token":
        wide = wide * (place % s == 0)[:, None]
    images = len(x) * tensor.size // s
    summed = wide.new_zeros(images, x.shape[1]).index_add(0, place // s, wide)
    summed = sum_over_ranks(summed, tensor.with_whole_rows())
    return (summed if model.pooling == "token" else summed / s).to(x.dtype)
