"""Text to measure importance on, as a language model's first hidden states.

Legend: n sequences, s positions, D d_model, V vocabulary.
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
from matformer_dist.importing.calibration import Calibration
from matformer_dist.models.rotation import Rotation


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


def of_tokens(model: LanguageModelConfig, tokens: Tensor, embedding: Tensor) -> Calibration:
    """tokens [n, s], embedding [V, D]."""
    rotation = Rotation.of(torch.arange(tokens.shape[1]), model)
    return Calibration(model, F.embedding(tokens, embedding), rotation, "text")
