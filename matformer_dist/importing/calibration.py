"""Calibration: text or images through the whole model, one layer in memory at a time.

Legend: n samples (sequences, or images), s positions of one, D d_model, F d_ff.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.models.block import Block
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import SINGLE

_THESE = {"text": "this text", "images": "these images"}


class Calibration:
    """Hidden states [n, s, D], changed in place, on their way through a model in fp32.

    rotation: of the s positions, of a language model. samples: what they are of, for messages.
    """

    def __init__(
        self,
        model: ModelConfig,
        hidden: Tensor,
        rotation: Rotation | None,
        samples: Literal["text", "images"],
    ) -> None:
        self.model, self.samples = model, samples
        self._hidden, self._rotation = hidden, rotation

    @torch.no_grad()
    def through(self, weights: dict[str, Tensor]) -> Tensor:
        """Go through the layer of these weights; means [F] of its neurons' |activations|.

        Sample after sample, so beside the hidden states of all only one's activations
        [s, 2 * F] are in memory.
        """
        block = self._block(weights)
        total = torch.zeros(self.model.d_ff, dtype=torch.float64)
        for i, x in enumerate(self._hidden):
            x = x + block.attention(block.attention_norm(x), len(x), self._rotation)
            activation = self._activation(block.ffn_norm(x), weights)
            total += activation.abs().sum(dim=0, dtype=torch.float64)
            y = activation @ weights["ffn.w_out"]
            self._hidden[i] = x + (y + weights["ffn.b_out"] if self.model.biases else y)
        if not total.isfinite().all():
            raise UserError(
                f"activations of the calibration {self.samples} are not finite in fp32; the "
                f"checkpoint cannot run {_THESE[self.samples]}: check it with transformers, or "
                "order by magnitude (without --calibration)"
            )
        return (total / self._hidden[..., 0].numel()).to(torch.float32)

    def _activation(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """x [s, D], normed -> [s, F]."""
        w_in = weights["ffn.w_in"].view(-1, self.model.d_model)
        h = F.linear(x, w_in, weights["ffn.b_in"] if self.model.biases else None)
        if self.model.ffn == "gelu":
            return F.gelu(h)
        gate, up = h.unflatten(1, (-1, 2)).unbind(2)
        return F.silu(gate) * up

    def _block(self, weights: dict[str, Tensor]) -> Block:
        whole = Nesting.from_widths([self.model.d_ff])
        with torch.device("meta"):
            block = Block("layer", self.model, whole, Initializer(seed=None), SINGLE)
        block.load_state_dict(weights, assign=True)
        return block
