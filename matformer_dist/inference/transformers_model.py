"""Text from an `hf` directory, by transformers: one submodel, one prompt after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.inference.batch import New, Request, Rows
from matformer_dist.inference.decoding import one_by_one
from matformer_dist.inference.loading import load_transformers
from matformer_dist.inference.sampling import Sampling
from matformer_dist.inference.texts import Piece, as_text, encode_prompts


class TransformersModel:
    """See `load_transformers`, which loads it."""

    def __init__(
        self, directory: Path, dtype: torch.dtype | None, device: torch.device, sparse: bool = False
    ) -> None:
        self.directory = directory
        self._device = device
        self._tokenizer = load_tokenizer(directory)
        self._context, self._logits = load_transformers(directory, dtype, device, sparse)

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """As that of LoadedModel."""
        ids = encode_prompts(self._tokenizer, prompts)
        eod = self._tokenizer.eod
        request = Request(ids, max_new_tokens, sampling, seed, eod, self._context)
        return as_text(self._passes(request), ids, self._tokenizer)

    def _passes(self, request: Request) -> Iterator[list[New]]:
        for i in range(len(request.prompts)):
            rows = Rows(request, [i], self._device)

            def next_logits(rows: Rows = rows) -> Tensor:
                return self._logits(torch.tensor(rows.tokens, device=self._device))

            yield from one_by_one(rows, next_logits, lambda _: None)
