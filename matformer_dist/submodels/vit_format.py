"""The `hf` format of a vision encoder: a ViTForImageClassification, and how to prepare images.

It has one FFN width: the narrower layers of a Mix'n'Match submodel are padded with zero neurons,
biases too.
"""

from __future__ import annotations

import json
import math
from typing import Any

from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.errors import UserError
from matformer_dist.models.vit_names import transformers_names
from matformer_dist.submodels.parts import Export, Source
from matformer_dist.submodels.safetensors_files import SafetensorsFiles
from matformer_dist.submodels.vit_parts import check_heads, vit_parts

_BICUBIC = 3  # Pillow's number for it


def vit_export(source: Source) -> Export:
    """UserError where transformers' ViT does not compute what this model does."""
    model = source.vision_model
    if model.pooling != "token":
        raise UserError(
            "ViTForImageClassification of transformers classifies by a class token, and this "
            f"model has pooling: {model.pooling}; extract with --format timm or native"
        )
    check_heads(model, "transformers")
    widest = max(source.submodel.widths)
    parts = vit_parts(source, transformers_names(), widest)
    config, processor = _config(source, widest), _processor(source.preprocessing)
    return Export(
        SafetensorsFiles(parts, source.torch_dtype, source.shard_bytes),
        {
            "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "preprocessor_config.json": json.dumps(processor, indent=2) + "\n",
        },
        padded_width=None if source.submodel.is_uniform else widest,
    )


def _config(source: Source, width: int) -> dict[str, Any]:
    """config.json, at `width` neurons in every layer."""
    model, names = source.vision_model, source.class_names.names
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.d_model,
        "intermediate_size": width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_eps,
        "qkv_bias": True,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "encoder_stride": model.patch_size,
        "num_channels": model.channels,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "dtype": str(source.torch_dtype).removeprefix("torch."),
    }


def _processor(images: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json: the shorter side resized, then a square from the middle."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": images.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(images.image_size / images.crop_pct)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": images.image_size, "width": images.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
