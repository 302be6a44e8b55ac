"""Small models of every task, in fp64, and what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.matlm import MatLM
from matformer_dist.models.matvit import MatViT
from matformer_dist.nesting import Nesting, Segment, Submodel
from matformer_dist.parallel.layers import Initializer

VOCAB, CLASSES = 37, 7
NESTING = Nesting.from_widths([3, 5, 11, 16])
LAYERS = 3
SHAPE: dict[str, Any] = {
    "d_model": 24, "n_layers": LAYERS, "n_heads": 4, "d_ff": 16, "init_std": 0.3,
}  # fmt: skip
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped-query, tied": {"n_kv_heads": 2, "tied_embeddings": True},
    "wide heads": {"n_kv_heads": 2, "kv_channels": 24},
    "paper": {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True},
}
VISION: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit, mean, sincos": {"pooling": "mean", "positions": "sincos", "channels": 1},
}


def matlm(**settings: Any) -> MatLM:
    model = LanguageModelConfig(**{**SHAPE, "max_seq_len": 32, **settings})
    return MatLM(model, [NESTING] * LAYERS, VOCAB, Initializer(seed=1)).double()


def matvit(**settings: Any) -> MatViT:
    """Its biases are drawn too: they begin as zeros."""
    model = VisionModelConfig(**{**SHAPE, "image_size": 6, "patch_size": 2, **settings})
    vit = MatViT(model, [NESTING] * LAYERS, CLASSES, Initializer(seed=1)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "bias" in name or ".b_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return vit


def model_of(variant: str) -> MatFormer:
    return matlm(**LANGUAGE[variant]) if variant in LANGUAGE else matvit(**VISION[variant])


def samples_of(model: MatFormer, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, MatViT):
        of = model.model
        size = (count, of.channels, of.image_size, of.image_size)
        images = torch.randn(size, generator=generator, dtype=torch.double)
        return images, torch.randint(0, CLASSES, (count, 1), generator=generator)
    ids = torch.randint(0, VOCAB, (count, 10), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def logits_of(model: MatFormer, inputs: Tensor, submodel: Submodel) -> Tensor:
    """[b, predictions, V]"""
    if isinstance(model, MatViT):
        return model.logits(inputs, submodel)[:, None]
    assert isinstance(model, MatLM)
    return model.logits(inputs, submodel)


def plan(segments: list[Segment], shared: bool, weights: list[float]) -> Pass:
    zeros = (0.0,) * len(segments)
    return Pass(tuple(segments), shared, tuple(weights), zeros, zeros)


def loss_and_gradients(
    model: MatFormer, samples: tuple[Tensor, Tensor], run: Pass
) -> tuple[Tensor, list[Tensor]]:
    loss, _ = model(*samples, run)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))
