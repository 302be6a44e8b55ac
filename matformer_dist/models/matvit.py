"""MatViT: a nested vision encoder (paper sec. 4.2), all granularities of a batch in one pass.

Legend: b images, B images in flight, s rows of an image, D d_model, V classes; see matformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.models.block import norm
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.head import Head
from matformer_dist.models.matformer import MatFormer
from matformer_dist.models.patches import PatchEmbedding, pool
from matformer_dist.nesting import Nesting, Segment, Submodel
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import SINGLE, TensorParallel


class MatViT(MatFormer):
    """Inputs are images [b, C, H, H], targets their classes [b, 1]; an image is one prediction."""

    model: VisionModelConfig

    def __init__(
        self,
        model: VisionModelConfig,
        nestings: Sequence[Nesting],
        classes: int,
        init: Initializer,
        tensor: TensorParallel = SINGLE,
    ) -> None:
        whole = tensor.with_whole_rows()  # of the pooled rows
        embedding = PatchEmbedding(model, init, tensor)
        head = Head(model, classes, init, whole, bias=True)
        super().__init__(model, nestings, embedding, norm(model, whole), head, init, tensor)

    def hidden(
        self, inputs: Tensor, segments: Sequence[Segment], shared_tokens: bool = False
    ) -> Tensor:
        """images [b, C, H, H] -> one row of each image, pooled, then normed [B, D].

        In this order the norm sees a row an image: that of a class token is the same either way;
        behind a mean it is timm's `fc_norm`.
        """
        x = self.embedding(inputs)
        x = self.through_layers(x, self.model.rows, segments, shared_tokens)
        return self.final_norm(pool(x, self.model, self.tensor))

    def forward(self, inputs: Tensor, targets: Tensor, plan: Pass) -> tuple[Tensor, Tensor]:
        """See MatFormer.forward; images are mixed first, where the plan says so."""
        kept = 1.0
        if plan.soft is not None:
            inputs, kept = plan.soft.mix(inputs)
        hidden = self.hidden(inputs, plan.segments, plan.shared_tokens)
        return self.head(hidden, None, targets, plan, kept)

    def logits(self, images: Tensor, submodel: Submodel) -> Tensor:
        """images [b, C, H, H] -> logits [b, V] of one submodel."""
        return self.head.logits(self.embed(images, submodel), None)

    def embed(self, images: Tensor, submodel: Submodel) -> Tensor:
        """images [b, C, H, H] -> what the head of one submodel sees of them [b, D]."""
        return self.hidden(images, [Segment(submodel, len(images))])
