"""Run directories of vision encoders with random weights, written without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.data.images.classes import ClassNames
from matformer_dist.models.matvit import MatViT
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from tests.unit.submodels.synthetic_run import write_files

CLASSES = ClassNames(("ant", "bee", "cat, tabby", "dög", "elk"), "the tests")  # odd: padded ranks
NESTING = Nesting.from_widths([8, 16, 40, 64])


def vision_config(**changes: Any) -> VisionModelConfig:
    shape: dict[str, Any] = {
        "d_model": 32, "n_layers": 3, "n_heads": 4, "d_ff": 64, "image_size": 12, "patch_size": 4,
        "init_std": 0.2,
    }  # fmt: skip
    return VisionModelConfig.model_validate({**shape, **changes})


def random_vit(model: VisionModelConfig, seed: int = 3) -> MatViT:
    """Whole random weights; biases and norms too, or an export that forgets them goes unnoticed."""
    vit = MatViT(model, [NESTING] * model.n_layers, len(CLASSES), Initializer(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return vit.eval()


def some_images(model: VisionModelConfig, count: int = 3) -> Tensor:
    """[count, C, H, H]"""
    size = (count, model.channels, model.image_size, model.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def random_images(channels: int) -> Iterator[Image.Image]:
    """Two square ones and two others. Smooth, as photographs are: where bicubic interpolation
    overshoots, Pillow's result depends on the order of its two passes, and that on the size.
    """
    generator = torch.Generator().manual_seed(2)
    for height, width in [(40, 40), (28, 28), (33, 47), (50, 31)]:
        pixels = torch.randint(60, 200, (6, 6, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy()).resize((width, height))
        yield image.convert("L" if channels == 1 else "RGB")


def write_vision_run(
    directory: Path,
    vit: MatViT,
    *,
    tensor: int = 1,
    step: int = 5,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """A run directory whose checkpoint holds `vit` as ZeRO 0 leaves it on `tensor` ranks.

    data: keys of the section `data`.
    """
    config = {
        "task": "vision",
        "run": {"dir": str(directory)},
        "model": vit.model.model_dump(mode="json"),
        "nesting": {"widths": list(NESTING.widths)},
        "data": {"train": "unused", **(data or {})},
        "training": {"steps": 5, "micro_batch_size": 1, "global_batch_size": 1},
    }
    return write_files(directory, vit, NESTING, CLASSES, config, tensor=tensor, step=step, units=1)
