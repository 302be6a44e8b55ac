"""config.json of a ViT of transformers as our model's settings, or why it is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.importing.checkpoint_config import (
    invalid_config,
    not_allowed,
    refuse,
)
from matformer_dist.importing.checkpoint_weights import Kind
from matformer_dist.importing.vit_description import ViTDescription, not_square, side
from matformer_dist.importing.vit_preprocessing import read_preprocessing
from matformer_dist.models.vit_names import transformers_names

_CLASSIFIER, _BACKBONE = "ViTForImageClassification", "ViTModel"
_KEYS = {  # ours: theirs
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
}
_DEFAULTS = {  # of transformers' ViTConfig, where a file leaves a key out
    "head_dim": None,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_ALLOWED: dict[str, tuple[Any, ...]] = {  # keys of what MatViT has in one kind only, or not at all
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "quantization_config": (None,),
}
_POOLER = tuple(f"{of}pooler.dense.{kind}" for of in ("", "vit.") for kind in ("weight", "bias"))
_KIND = Kind(
    "a plain ViT",
    "num_hidden_layers",
    "transformers: AutoModelForImageClassification.from_pretrained(DIR).save_pretrained(NEW)",
)


def read_vit_config(directory: Path, config: dict[str, Any]) -> ViTDescription:
    """`config`: the content of `directory`/config.json.

    UserError where it describes what MatViT does not compute: all such keys are named, with their
    values and what is allowed.
    """
    refuse(directory, _missing_or_foreign(config) or _faults(config))
    values = {**_DEFAULTS, **config}
    is_backbone = config.get("architectures") == [_BACKBONE]
    sizes = {"image_size": side(values["image_size"]), "patch_size": side(values["patch_size"])}
    try:
        model = VisionModelConfig.model_validate(
            {
                **{ours: values[theirs] for ours, theirs in _KEYS.items()},
                **sizes,
                "classes": None if is_backbone else (_classes(config) or None),
            }
        )
    except ValidationError as error:
        raise invalid_config(directory, error, {**_KEYS, "classes": "num_labels"}) from None
    images, notices = read_preprocessing(directory, model.image_size, model.channels)
    return ViTDescription(
        model,
        transformers_names("" if is_backbone else "vit."),
        _POOLER,
        config.get("id2label"),
        images,
        notices,
        _KIND,
    )


def _missing_or_foreign(config: dict[str, Any]) -> list[str]:
    """Why this is no plain ViT at all, where other keys would say nothing."""
    if config.get("model_type") != "vit":
        return [f"model_type is {config.get('model_type')!r}, allowed is 'vit'"]
    architectures = config.get("architectures") or [_CLASSIFIER]
    if architectures not in ([_CLASSIFIER], [_BACKBONE]):
        allowed = f"['{_CLASSIFIER}'] or ['{_BACKBONE}']"
        return [f"architectures is {architectures!r}, allowed is {allowed}"]
    needed = [key for key in _KEYS.values() if key not in _DEFAULTS]
    return [f"it does not set {key}" for key in needed if config.get(key) is None]


def _faults(config: dict[str, Any]) -> list[str]:
    return [*not_allowed(config, _ALLOWED), *not_square(config, ("image_size", "patch_size"))]


def _classes(config: dict[str, Any]) -> Any:
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else config.get("num_labels", 2)
