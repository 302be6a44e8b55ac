"""A vision encoder in memory: classes and embeddings of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matformer_dist.inference.held import LoadedModel
from matformer_dist.models.matvit import MatViT
from matformer_dist.nesting import Submodel


@dataclass(frozen=True)
class LoadedVisionModel(LoadedModel):
    model: MatViT

    @torch.no_grad()
    def embed(self, submodel: Submodel, images: Tensor) -> Tensor:
        """images [b, C, H, H] -> embeddings [b, D], what the head of a submodel sees."""
        return self.model.embed(images.to(self.model.device), submodel)
