"""The sequences that submodels are measured on: those that training evaluates, in its order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.data.datasets import build_datasets, micro_batches
from matformer_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Validation:
    """tokens, targets [sequences, s]; `text_bytes` of all targets, in UTF-8."""

    tokens: Tensor
    targets: Tensor
    micro_batch_size: int
    text_bytes: int

    @classmethod
    def of(
        cls, config: Config, tokenizer: Tokenizer, batches: int | None, data: Path | None = None
    ) -> Validation:
        """`batches` of the run's global batch size; None: its evaluation.batches.

        data: prefix of token files to take instead of the run's validation data. UserError where
        there are none, or too few.
        """
        prefixes = config.data.validation if data is None else [(1.0, str(data))]
        if prefixes:  # as training data too: those of the run may be elsewhere, and are not read
            other = config.data.model_copy(update={"train": prefixes, "validation": prefixes})
            config = config.model_copy(update={"data": other})
        size = config.training.micro_batch_size
        sequences = (batches or config.evaluation.batches) * config.training.global_batch_size
        _, dataset = build_datasets(config, tokenizer, size, sequences)
        assert dataset is not None
        source = micro_batches(
            dataset,
            consumed=0,
            micro_batch_size=size,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        tokens, targets = zip(*islice(source, sequences // size), strict=True)
        whole = torch.cat(targets)
        text_bytes = int(tokenizer.token_bytes[whole.numpy()].sum())
        return cls(torch.cat(tokens), whole, size, text_bytes)

    @property
    def digest(self) -> str:
        """Equal digests mean equal sequences."""
        whole = torch.cat([self.tokens, self.targets[:, -1:]], dim=1)
        return hashlib.sha256(repr(whole.shape).encode() + whole.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        """Micro-batches."""
        return -(-len(self.tokens) // self.micro_batch_size)

    def micro_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, targets) [b, s]."""
        size = self.micro_batch_size
        for pair in zip(self.tokens.split(size), self.targets.split(size), strict=True):
            yield pair[0].to(device), pair[1].to(device)
