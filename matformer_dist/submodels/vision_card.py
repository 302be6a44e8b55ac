"""README.md of an extracted vision encoder: what it is, how images are prepared, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.submodels.model_card import measured, padded_note, write_card

_IMAGES = """\
{widths_note}
## Images

{preparation}
"""

_HF_LOADING = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("PATH")
model = AutoModelForImageClassification.from_pretrained("PATH")
images = processor(Image.open("image.jpg").convert("{mode}"), return_tensors="pt")
print(model.config.id2label[int(model(**images).logits.argmax())])"""

_TIMM_LOADING = """\
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:PATH", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
image = transform(Image.open("image.jpg").convert("{mode}"))
print(model.pretrained_cfg["label_names"][int(model(image[None]).argmax())])"""

_NATIVE_LOADING = """\
from PIL import Image

from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.inference.loading import load_vision_model

loaded = load_vision_model("PATH")
prepare = Preprocessing({image_size}, {channels}, {mean}, {std}, {crop_pct})
logits = loaded.model.logits(prepare(Image.open("image.jpg"))[None], loaded.submodel)
print(loaded.labels.names[int(logits.argmax())])"""

_LOADING = {"native": _NATIVE_LOADING, "hf": _HF_LOADING, "timm": _TIMM_LOADING}
_LIBRARY = {"native": [], "hf": ["library_name: transformers"], "timm": ["library_name: timm"]}


def vision_card(entry: Mapping[str, Any], model: VisionModelConfig, classes: int) -> str:
    """See write_card; entry: the content of submodel.json."""
    kind, images = entry["format"], entry["preprocessing"]
    numbers = {
        "image_size": images["image_size"],
        "channels": images["channels"],
        "mean": tuple(images["mean"]),
        "std": tuple(images["std"]),
        "crop_pct": images["crop_pct"],
    }
    size, patch = model.image_size, model.patch_size
    colours, mode = ("RGB", "RGB") if model.channels == 3 else ("grey", "L")
    note = ""
    if entry["padded_width"] is not None:
        note = padded_note(entry, "The format `native` has")
    return write_card(
        entry,
        "vision encoder",
        front_matter=[
            *_LIBRARY[kind], "pipeline_tag: image-classification", "tags:", "- matformer",
            "- nested",
        ],
        shape={
            "layers, width, heads": f"{model.n_layers}, {model.d_model}, {model.n_heads}",
            "images": f"{size} x {size} pixels, {colours}; patches of {patch} x {patch}",
            "classified by": (
                "a class token" if model.pooling == "token" else "the mean of the patches"
            ),
            "classes": f"{classes:,}",
        },
        measures={
            "validation accuracy": measured(entry["accuracy"], "{:.2%}"),
            "validation loss": measured(entry["loss"], "{:.4f} nats per image"),
        },
        sections=_IMAGES.format(widths_note=note, preparation=_preparation(kind, numbers)),
        loading=_LOADING[kind].format(**numbers, mode=mode),
    )  # fmt: skip


def _preparation(kind: str, numbers: Mapping[str, Any]) -> str:
    shorter = math.floor(numbers["image_size"] / numbers["crop_pct"])
    said = (
        f"Validation resized the shorter side of an image to {shorter} pixels (bicubic), cut a "
        f"square of {numbers['image_size']} from the middle, took values from 0 to 1, and from "
        f"these (value - mean) / std, with mean {list(numbers['mean'])} and std "
        f"{list(numbers['std'])}."
    )
    if kind == "hf":
        said += (
            " preprocessor_config.json says the same; transformers rounds half a pixel of what is "
            "cut off down, not up, and where torchvision is installed it resizes with other "
            "roundings than Pillow."
        )
    if kind == "timm":
        said += " `pretrained_cfg` in config.json says the same."
    return said
