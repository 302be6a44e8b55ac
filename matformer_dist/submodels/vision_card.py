"""README.md of an extracted vision encoder: what it is, how images are prepared, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.submodels.model_card import width_runs

_CARD = """\
---
{front_matter}
---

# {submodel} of a MatFormer vision encoder

Taken out of a universal model by slicing, without training: step {step} of the run
`{run}`.

| | |
|---|---|
| submodel | {submodel} |
| FFN width of each layer | {widths} |
| parameters | {parameters:,} |
| without embedding and head | {non_embedding_parameters:,} |
| layers, width, heads | {n_layers}, {d_model}, {n_heads} |
| images | {image_size} x {image_size} pixels, {colours}; patches of {patch_size} x {patch_size} |
| classified by | {pooled} |
| classes | {classes:,} |
| weights | {dtype}, {bytes:,} bytes, from {trained} |
| validation accuracy | {accuracy} |
| validation loss | {loss} |
{widths_note}
## Images

{preparation}

## How to load it

```python
{loading}
```
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
_COPIED = (
    "submodel", "step", "run", "parameters", "non_embedding_parameters", "dtype", "bytes",
    "trained",
)  # fmt: skip


def vision_card(entry: Mapping[str, Any], model: VisionModelConfig, classes: int) -> str:
    """The card of the model that `entry`, the content of submodel.json, describes."""
    kind, images = entry["format"], entry["preprocessing"]
    tags = ["pipeline_tag: image-classification", "tags:", "- matformer", "- nested"]
    numbers = {
        "image_size": images["image_size"],
        "channels": images["channels"],
        "mean": tuple(images["mean"]),
        "std": tuple(images["std"]),
        "crop_pct": images["crop_pct"],
    }
    return _CARD.format(
        **{key: entry[key] for key in _COPIED},
        front_matter="\n".join([*_LIBRARY[kind], *tags]),
        widths=width_runs(entry["widths"]),
        n_layers=model.n_layers,
        d_model=model.d_model,
        n_heads=model.n_heads,
        image_size=model.image_size,
        colours="RGB" if model.channels == 3 else "grey",
        patch_size=model.patch_size,
        pooled="a class token" if model.pooling == "token" else "the mean of the patches",
        classes=classes,
        accuracy=_measured(entry["accuracy"], "{:.2%}"),
        loss=_measured(entry["loss"], "{:.4f} nats per image"),
        widths_note=_widths_note(entry),
        preparation=_preparation(kind, numbers),
        loading=_LOADING[kind].format(**numbers, mode="RGB" if model.channels == 3 else "L"),
    )


def _measured(value: float | None, words: str) -> str:
    return "not measured" if value is None else words.format(value)


def _widths_note(entry: Mapping[str, Any]) -> str:
    if entry["padded_width"] is None:
        return ""
    return (
        "\nThe architecture has one FFN width, so narrower layers are padded to "
        f"{entry['padded_width']} neurons with zeros: the result is exactly the same, memory and "
        "time are those of the padded width. The format `native` has the exact widths.\n"
    )


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
