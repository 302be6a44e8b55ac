"""Calibration: text through the whole model, one layer in memory at a time.

Legend: n sequences, s positions, R = n * s rows, D d_model, F d_ff.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.data.corpus import INCLUDE, find_files, pieces
from matformer_dist.data.documents import DocumentReader
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.models.block import Block
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import SINGLE


def read_tokens(
    inputs: Sequence[Path], tokenizer: Tokenizer, tokens: int, seq_len: int, text_key: str = "text"
) -> Tensor:
    """The first `tokens` ids of the inputs' documents as sequences [n, s], as in training.

    s is `seq_len`, or what there is where that is less; what fills no sequence is left out.
    UserError where the inputs hold no text.
    """
    if tokens < 1:
        raise UserError(f"--calibration-tokens {tokens} must be above 0, for example 8192")
    reader = DocumentReader(text_key)
    eod = np.array([tokenizer.eod], np.int32)
    arrays: list[NDArray[np.int32]] = []
    held = 0
    found = chain.from_iterable(
        pieces(file, reader.text_key) for file in find_files(inputs, INCLUDE, ())
    )
    for text in chain.from_iterable(map(reader.read, found)):
        if text:
            arrays += [tokenizer.encode_array(text), eod]
            held += sum(map(len, arrays[-2:]))
        if held >= tokens:
            break
    if not held:
        raise UserError(f"the calibration text {', '.join(map(str, inputs))} is empty; give text")
    ids = torch.from_numpy(np.concatenate(arrays).astype(np.int64))[:tokens]
    length = min(seq_len, len(ids))
    count = len(ids) // length
    return ids[: count * length].view(count, length)


class Calibration:
    """The hidden states [n, s, D] of calibration text, on their way through a model in fp32."""

    def __init__(self, model: LanguageModelConfig, tokens: Tensor, embedding: Tensor) -> None:
        """tokens [n, s], embedding [V, D]."""
        self.model = model
        self._hidden = F.embedding(tokens, embedding)
        positions = torch.arange(tokens.shape[1])
        self._rotation = Rotation.of(positions, model)

    @torch.no_grad()
    def through(self, weights: dict[str, Tensor]) -> Tensor:
        """Go through the layer of these weights; means [F] of its neurons' |activations|.

        Sequence after sequence, so beside the hidden states of all only one's activations
        [s, 2 * F] are in memory.
        """
        block = self._block(weights)
        total = torch.zeros(self.model.d_ff, dtype=torch.float64)
        for i, x in enumerate(self._hidden):
            x = x + block.attention(block.attention_norm(x), len(x), self._rotation)
            gate_up = F.linear(block.ffn_norm(x), weights["ffn.w_in"].view(-1, self.model.d_model))
            gate, up = gate_up.unflatten(1, (-1, 2)).unbind(2)
            activation = F.silu(gate) * up
            total += activation.abs().sum(dim=0, dtype=torch.float64)
            self._hidden[i] = x + activation @ weights["ffn.w_out"]
        if not total.isfinite().all():
            raise UserError(
                "activations of the calibration text are not finite in fp32; the checkpoint "
                "cannot run this text: check it with transformers, or order by magnitude "
                "(without --calibration)"
            )
        return (total / self._hidden[..., 0].numel()).to(torch.float32)

    def _block(self, weights: dict[str, Tensor]) -> Block:
        whole = Nesting.from_widths([self.model.d_ff])
        with torch.device("meta"):
            block = Block("layer", self.model, whole, Initializer(seed=None), SINGLE)
        block.load_state_dict(weights, assign=True)
        return block
