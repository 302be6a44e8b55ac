"""The weights of a plain ViT, of transformers or timm, read as MatViT's, a tensor at a time.

Legend: H heads, h head size, A = H * h, D d_model, C channels, P patch size, s rows of an image,
V classes. models/vit_names.py has the layouts, ours and theirs; submodels/vit_parts.py is the
inverse.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.importing.checkpoint_weights import CheckpointWeights, Shape, by_head
from matformer_dist.importing.vit_description import ViTDescription
from matformer_dist.models.vit_names import ViTNames


class ViTWeights:
    """A checkpoint's weights on disk; only headers are read before a weight is asked for.

    UserError where files are missing, damaged, pickles, or hold other weights than are described.
    """

    def __init__(self, directory: Path, described: ViTDescription) -> None:
        self.model, self.names = described.model, described.names
        self._weights = CheckpointWeights(directory, described.kind)
        before_number = self.names.layer.partition("{}")[0]
        self._weights.check_layers(before_number, self.model.n_layers)
        self.unused = self._weights.names.intersection(described.unused)
        self._weights.check(_shapes(self.model, self.names), self.unused)

    def embedding(self) -> dict[str, Tensor]:
        """weight [D, C * P * P], bias [D], class_token [D] if there is one, positions [s, D]."""
        found = {
            "weight": self._outer("embedding.weight").flatten(1),
            "bias": self._outer("embedding.bias"),
            "positions": self._outer("embedding.positions")[0],
        }
        if self.model.pooling == "token":
            found["class_token"] = self._outer("embedding.class_token").flatten()
        return found

    def layer(self, i: int) -> dict[str, Tensor]:
        """fp32 weights of layer i, under the names they have in a Block."""
        before = self.names.layer.format(i)
        found = {
            ours: self._weights.read(before + theirs) for ours, theirs in self.names.inner.items()
        }
        found["ffn.w_out"] = found["ffn.w_out"].T.contiguous()
        for ours, kind in (("attention.w_qkv", "weight"), ("attention.b_qkv", "bias")):
            parts = [self._weights.read(f"{before}{of}.{kind}") for of in self.names.qkv]
            q, k, v = parts if len(parts) == 3 else parts[0].chunk(3)
            found[ours] = by_head(q, k, v, self.model.n_heads)
        return found

    def final_norm(self) -> dict[str, Tensor]:
        """weight and bias [D]."""
        return {name: self._outer(f"final_norm.{name}") for name in ("weight", "bias")}

    def head(self) -> dict[str, Tensor]:
        """weight [V, D], bias [V], where there is one."""
        return {name: self._outer(f"head.{name}") for name in ("weight", "bias")}

    def _outer(self, ours: str) -> Tensor:
        return self._weights.read(self.names.outer[ours])


def _shapes(model: VisionModelConfig, names: ViTNames) -> dict[str, Shape]:
    """Their names, and shapes, of every weight."""
    D, A = model.d_model, model.attention_width
    outer: dict[str, Shape] = {
        "embedding.weight": (D, model.channels, model.patch_size, model.patch_size),
        "embedding.bias": (D,),
        "embedding.positions": (1, model.rows, D),
        "final_norm.weight": (D,),
        "final_norm.bias": (D,),
    }
    if model.pooling == "token":
        outer["embedding.class_token"] = (1, 1, D)
    if model.classes is not None:
        outer |= {"head.weight": (model.classes, D), "head.bias": (model.classes,)}
    shapes = {names.outer[ours]: shape for ours, shape in outer.items()}
    inner: dict[str, Shape] = {
        "attention.w_out": (D, A),
        "ffn.w_in": (model.d_ff, D),
        "ffn.b_in": (model.d_ff,),
        "ffn.w_out": (D, model.d_ff),
    }
    each = 3 * A // len(names.qkv)
    for i in range(model.n_layers):
        before = names.layer.format(i)
        shapes |= {before + theirs: inner.get(ours, (D,)) for ours, theirs in names.inner.items()}
        for module in names.qkv:
            shapes |= {f"{before}{module}.weight": (each, D), f"{before}{module}.bias": (each,)}
    return shapes
