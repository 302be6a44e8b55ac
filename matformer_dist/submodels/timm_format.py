"""The `timm` format: what `timm.create_model("local-dir:PATH", pretrained=True)` loads.

config.json names timm's plain ViT; what differs from it stands in `model_args`. The FFNs have one
width there, `mlp_ratio` times the model's: the narrower layers of a Mix'n'Match submodel are padded
with zero neurons, biases too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from matformer_dist.errors import UserError
from matformer_dist.models.vit_names import timm_names
from matformer_dist.submodels.formats import TIMM_NORM_EPS
from matformer_dist.submodels.parts import Export, Source
from matformer_dist.submodels.safetensors_files import SafetensorsFiles
from matformer_dist.submodels.vit_parts import check_heads, vit_parts

_ARCHITECTURE = "vit_base_patch16_224"


def timm_export(source: Source) -> Export:
    """UserError where timm's plain ViT does not compute what this model does."""
    model = source.vision_model
    check_heads(model, "timm")
    if model.norm_eps != TIMM_NORM_EPS:
        raise UserError(
            f"a ViT of timm norms with an eps of {TIMM_NORM_EPS:g}, this model with norm_eps "
            f"{model.norm_eps:g}; extract with --format native"
            + (" or hf" if model.pooling == "token" else "")
        )
    widest = max(source.submodel.widths)
    parts = vit_parts(source, timm_names(model.pooling), widest)
    config = json.dumps(_config(source, widest), indent=2, ensure_ascii=False)
    return Export(
        SafetensorsFiles(parts, source.torch_dtype, sys.maxsize),  # timm reads one file
        {"config.json": config + "\n"},
        padded_width=None if source.submodel.is_uniform else widest,
    )


def _config(source: Source, width: int) -> dict[str, Any]:
    """config.json, at `width` neurons in every layer."""
    model, names, images = source.vision_model, source.class_names.names, source.preprocessing
    pool = "token" if model.pooling == "token" else "avg"
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": len(names),
        "num_features": model.d_model,
        "global_pool": pool,
        "label_names": list(names),
        "model_args": {
            "img_size": model.image_size,
            "patch_size": model.patch_size,
            "in_chans": model.channels,
            "num_classes": len(names),
            "global_pool": pool,
            "class_token": model.pooling == "token",
            "embed_dim": model.d_model,
            "depth": model.n_layers,
            "num_heads": model.n_heads,
            "mlp_ratio": mlp_ratio(width, model.d_model),
        },
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [model.channels, model.image_size, model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": images.crop_pct,
            "crop_mode": "center",
            "mean": list(images.mean),
            "std": list(images.std),
            "num_classes": len(names),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def mlp_ratio(width: int, d_model: int) -> float:
    """Of which timm's int(d_model * mlp_ratio) is `width`: a quotient may come out just below."""
    ratio = width / d_model
    return ratio if int(d_model * ratio) == width else (width + 0.5) / d_model
