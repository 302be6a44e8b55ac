"""Tiny ViTs as transformers and timm make and save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.models.matvit import MatViT
from matformer_dist.run_directory import find_checkpoint
from tests.with_timm import import_timm, mend_torchvision

mend_torchvision()
transformers = pytest.importorskip("transformers")

CLASSES = ("ant", "bee", "cat, tabby", "dög", "elk")


def random_hf(seed: int = 5, kind: str = "ViTForImageClassification", **changes: Any) -> Any:
    """Weights of all kinds random, or an import that forgets one goes unnoticed."""
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 12, "patch_size": 4, "initializer_range": 0.2,
        "id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)},
    }  # fmt: skip
    torch.manual_seed(seed)
    return _shaken(getattr(transformers, kind)(transformers.ViTConfig(**{**shape, **changes})))


def save_hf(vit: Any, directory: Path, shard_size: str = "30KB", **processor: Any) -> Path:
    """A checkpoint in shards, as downloaded."""
    vit.save_pretrained(directory, max_shard_size=shard_size)
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "resample": 2, "size": {"height": 12, "width": 12}, **processor,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def random_timm(seed: int = 5, name: str = "vit_tiny_patch16_224", **changes: Any) -> Any:
    shape: dict[str, Any] = {
        "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "img_size": 12,
        "patch_size": 4, "num_classes": 5,
    }  # fmt: skip
    timm = import_timm()
    torch.manual_seed(seed)
    return _shaken(timm.create_model(name, **{**shape, **changes}))


def save_timm(vit: Any, directory: Path, **config: Any) -> Path:
    """As timm pushes it to the hub; `config`: keys of config.json."""
    timm = import_timm()
    timm.models.save_for_hf(vit, directory, model_config=config, safe_serialization=True)
    return directory


def _shaken(vit: Any) -> Any:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit.eval()


def some_images(channels: int = 3, size: int = 12, count: int = 4) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def load(run: Path) -> MatViT:
    """The imported universal model, in memory."""
    vit = load_universal(find_checkpoint(str(run))).build().eval()
    assert isinstance(vit, MatViT)
    return vit


@torch.no_grad()
def xl_logits(run: Path, images: Tensor) -> Tensor:
    vit = load(run)
    nesting = load_universal(find_checkpoint(str(run))).nesting
    return vit.logits(images, nesting.uniform(nesting.largest, vit.model.n_layers))
