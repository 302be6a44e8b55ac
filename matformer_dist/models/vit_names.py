"""What transformers and timm call the weights of a ViT, by our names; shapes are their own too.

Legend: H heads, h head size, D d_model, F d_ff, C channels, P patch size, s rows of an image.

| ours                                    | theirs                                            |
|-----------------------------------------|---------------------------------------------------|
| embedding.weight [D, C * P * P]         | a convolution's [D, C, P, P]                      |
| class_token [D], positions [s, D]       | behind a dimension of images, [1, 1, D], [1, s, D] |
| w_qkv [H * 3 * h, D], b_qkv [H * 3 * h] | queries of all heads, then keys, then values: one |
|                                         | tensor (timm), or three (transformers)            |
| w_in [F, D], w_out [F, D]               | [F, D], [D, F]                                    |
| all else                                | the same                                          |

submodels/ writes these, importing/ reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ViTNames:
    outer: Mapping[str, str]  # of weights in no layer
    layer: str  # what stands before the names in layer {}
    inner: Mapping[str, str]  # of weights in a layer, but for queries, keys and values
    qkv: tuple[str, ...]  # the one module of all three, or the three modules


def transformers_names(backbone: Literal["vit.", ""] = "vit.") -> ViTNames:
    """As it writes them, and has always read them: since version 5 it renames them as it loads.

    backbone: what stands before all names but the classifier's; nothing in a model without one.
    """
    return ViTNames(
        outer={
            "embedding.weight": f"{backbone}embeddings.patch_embeddings.projection.weight",
            "embedding.bias": f"{backbone}embeddings.patch_embeddings.projection.bias",
            "embedding.class_token": f"{backbone}embeddings.cls_token",
            "embedding.positions": f"{backbone}embeddings.position_embeddings",
            "final_norm.weight": f"{backbone}layernorm.weight",
            "final_norm.bias": f"{backbone}layernorm.bias",
            "head.weight": "classifier.weight",
            "head.bias": "classifier.bias",
        },
        layer=f"{backbone}encoder.layer.{{}}.",
        inner={
            "attention_norm.weight": "layernorm_before.weight",
            "attention_norm.bias": "layernorm_before.bias",
            "attention.w_out": "attention.output.dense.weight",
            "attention.b_out": "attention.output.dense.bias",
            "ffn_norm.weight": "layernorm_after.weight",
            "ffn_norm.bias": "layernorm_after.bias",
            "ffn.w_in": "intermediate.dense.weight",
            "ffn.b_in": "intermediate.dense.bias",
            "ffn.w_out": "output.dense.weight",
            "ffn.b_out": "output.dense.bias",
        },
        qkv=tuple(f"attention.attention.{which}" for which in ("query", "key", "value")),
    )


def timm_names(pooling: Literal["token", "mean"]) -> ViTNames:
    """Of its VisionTransformer, without a class token where the mean is pooled."""
    norm = "norm" if pooling == "token" else "fc_norm"  # before pooling, or behind it
    return ViTNames(
        outer={
            "embedding.weight": "patch_embed.proj.weight",
            "embedding.bias": "patch_embed.proj.bias",
            "embedding.class_token": "cls_token",
            "embedding.positions": "pos_embed",
            "final_norm.weight": f"{norm}.weight",
            "final_norm.bias": f"{norm}.bias",
            "head.weight": "head.weight",
            "head.bias": "head.bias",
        },
        layer="blocks.{}.",
        inner={
            "attention_norm.weight": "norm1.weight",
            "attention_norm.bias": "norm1.bias",
            "attention.w_out": "attn.proj.weight",
            "attention.b_out": "attn.proj.bias",
            "ffn_norm.weight": "norm2.weight",
            "ffn_norm.bias": "norm2.bias",
            "ffn.w_in": "mlp.fc1.weight",
            "ffn.b_in": "mlp.fc1.bias",
            "ffn.w_out": "mlp.fc2.weight",
            "ffn.b_out": "mlp.fc2.bias",
        },
        qkv=("attn.qkv",),
    )
