"""config.json of a ViT of timm as our model's settings, or why it is none.

`architecture` names a function of timm, `model_args` what is otherwise than there, `pretrained_cfg`
the images. So of the functions those of plain ViTs must be known here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.importing.checkpoint_config import (
    invalid_config,
    not_allowed,
    refuse,
    short,
)
from matformer_dist.importing.checkpoint_weights import Kind
from matformer_dist.importing.vit_description import ViTDescription, not_square, side
from matformer_dist.models.vit_names import timm_names

_ARCHITECTURE = re.compile(
    r"vit_(tiny|small|base|large|huge|giant|gigantic)_patch(\d+)_\d+(_in21k)?"
    r"|deit_(tiny|small|base)_patch(16)_\d+"
)


class _Size(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


_SIZES = {
    "tiny": _Size(192, 12, 3),
    "small": _Size(384, 12, 6),
    "base": _Size(768, 12, 12),
    "large": _Size(1024, 24, 16),
    "huge": _Size(1280, 32, 16),
    "giant": _Size(1408, 40, 16, 48 / 11),
    "gigantic": _Size(1664, 48, 16, 64 / 13),
}
_KEYS = {  # ours: theirs
    "d_model": "embed_dim",
    "n_layers": "depth",
    "n_heads": "num_heads",
    "image_size": "img_size",
    "patch_size": "patch_size",
    "channels": "in_chans",
}
_ALLOWED: dict[str, tuple[Any, ...]] = {  # keys of what MatViT has in one kind only, or not at all
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "init_values": (None, 0),  # layer scale
    "pos_embed": ("learn",),
    "no_embed_class": (False,),
    "reg_tokens": (0,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "pool_include_prefix": (False,),
    "embed_norm_layer": (None, ""),
    "norm_layer": ("layernorm", None, ""),
    "act_layer": ("gelu", None, ""),
    "attn_layer": ("attn", None, ""),
    "use_naflex": (None, False),
}
_POOLINGS = ((("token", True), "token"), (("avg", False), "mean"))  # global_pool, class_token
_WITHOUT_EFFECT = {  # on what is computed of an image of the model's size, behind training
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad",
    "strict_img_size", "out_indices", "pretrained_strict",
}  # fmt: skip
_READ = {*_KEYS.values(), "mlp_ratio", "num_classes", "global_pool", "class_token", "fc_norm"}
_NORM_EPS = 1e-6
_KIND = Kind(
    "a plain ViT",
    "depth",
    "timm: timm.models.save_for_hf(timm.create_model('local-dir:DIR', pretrained=True), 'NEW', "
    "safe_serialization=True)",
)


def read_timm_config(directory: Path, config: dict[str, Any]) -> ViTDescription:
    """`config`: the content of `directory`/config.json.

    UserError where it describes what MatViT does not compute: all such keys are named, with their
    values and what is allowed.
    """
    refuse(directory, _foreign(config))
    images, given = config["pretrained_cfg"], config.get("model_args") or {}
    args = {**_defaults(config["architecture"], images), **given}
    pool = (args["global_pool"], args["class_token"])
    pooling = next((ours for theirs, ours in _POOLINGS if theirs == pool), None)
    refuse(directory, [*_faults(args, pooling)])
    classes = args.get("num_classes", config.get("num_classes", images.get("num_classes", 1000)))
    try:
        model = VisionModelConfig.model_validate(
            {
                **{ours: side(args[theirs]) for ours, theirs in _KEYS.items()},
                "d_ff": int(args["embed_dim"] * args["mlp_ratio"]),
                "norm_eps": _NORM_EPS,
                "pooling": pooling,
                "classes": classes or None,
            }
        )
    except ValidationError as error:
        raise invalid_config(directory, error, {**_KEYS, "classes": "num_classes"}) from None
    return ViTDescription(
        model,
        timm_names(model.pooling),
        (),
        config.get("label_names", images.get("label_names")),
        {
            "mean": images.get("mean", [0.485, 0.456, 0.406]),
            "std": images.get("std", [0.229, 0.224, 0.225]),
            "crop_pct": images.get("crop_pct", 0.875),
        },
        [*_notices(images)],
        _KIND,
    )


def _foreign(config: dict[str, Any]) -> list[str]:
    """Why this is no plain ViT of timm at all."""
    found = []
    architecture = config["architecture"]
    if not (isinstance(architecture, str) and _ARCHITECTURE.fullmatch(architecture)):
        found.append(
            f"architecture is {short(architecture)}, allowed are plain ViTs, "
            f"vit_{{{','.join(_SIZES)}}}_patchN_N and deit_{{tiny,small,base}}_patch16_N"
        )
    for key, missing in (("pretrained_cfg", None), ("model_args", {})):
        value = config.get(key, missing)
        if not isinstance(value, dict):
            found.append(f"{key} is {short(value)}, allowed is an object")
    return found or _size_fault(config["pretrained_cfg"].get("input_size", [3, 224, 224]))


def _size_fault(size: Any) -> list[str]:
    if isinstance(size, list) and len(size) == 3:
        return []
    return [f"input_size is {short(size)}, allowed are channels, height and width"]


def _defaults(architecture: str, images: dict[str, Any]) -> dict[str, Any]:
    """What timm takes where model_args say nothing."""
    match = _ARCHITECTURE.fullmatch(architecture)
    assert match is not None
    size = _SIZES[match[1] or match[4]]
    channels, *sides = images.get("input_size", [3, 224, 224])
    return {
        **size._asdict(),
        "patch_size": int(match[2] or match[5]),
        "img_size": sides if images.get("fixed_input_size") else 224,
        "in_chans": channels,
        "global_pool": "token",
        "class_token": True,
    }


def _faults(args: dict[str, Any], pooling: str | None) -> Iterator[str]:
    yield from not_allowed(args, _ALLOWED)
    if pooling is None:
        yield (
            f"global_pool is {short(args['global_pool'])} with class_token {args['class_token']}, "
            "allowed are 'token' with True and 'avg' with False"
        )
    elif args.get("fc_norm") not in (None, pooling == "mean"):
        yield f"fc_norm is {short(args['fc_norm'])}, allowed is {pooling == 'mean'} here"
    yield from not_square(args, ("img_size", "patch_size"))
    for key in ("embed_dim", "mlp_ratio"):
        if not (isinstance(args[key], int | float) and math.isfinite(args[key])):
            yield f"{key} is {short(args[key])}, allowed is a number"
    for key in sorted(args.keys() - _ALLOWED.keys() - _WITHOUT_EFFECT - _READ):
        yield f"{key} is {short(args[key])}, of which nothing is known here"


def _notices(images: dict[str, Any]) -> Iterator[str]:
    if images.get("interpolation", "bicubic") != "bicubic":
        yield f"pretrained_cfg resizes images {images['interpolation']}, the run bicubic"
    if images.get("crop_mode", "center") != "center":
        yield (
            f"pretrained_cfg has crop_mode {images['crop_mode']}; the run cuts a square from the "
            "middle"
        )
