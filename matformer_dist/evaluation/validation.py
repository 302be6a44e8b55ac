"""The samples that submodels are measured on: those that training evaluates, in its order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.config_language import LanguageConfig
from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.datasets import build_datasets, micro_batches
from matformer_dist.data.labels import Labels
from matformer_dist.data.tokenizer import Tokenizer


class Validation(ABC):
    """`samples`: sequences, or images; `predictions` of all of them; `text_bytes` of all targets,
    in UTF-8, of a text.
    """

    text_bytes: int | None

    @property
    @abstractmethod
    def samples(self) -> int: ...

    @property
    @abstractmethod
    def predictions(self) -> int: ...

    @property
    @abstractmethod
    def digest(self) -> str:
        """Equal digests mean equal samples."""

    @abstractmethod
    def __len__(self) -> int:
        """Micro-batches."""

    @abstractmethod
    def micro_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets), of b samples each."""


def open_validation(
    config: Config, labels: Labels, batches: int | None, data: str | Path | None = None
) -> Validation:
    """`batches` of the run's global batch size; None: its evaluation.batches.

    data: prefix of token files, or images, to take instead of the run's validation data. UserError
    where there are none, or too few.
    """
    if isinstance(config, VisionConfig):
        from matformer_dist.evaluation.images import open_images  # Pillow, for images alone

        return open_images(config, labels, batches, data)
    assert isinstance(config, LanguageConfig)
    assert isinstance(labels, Tokenizer)
    return Tokens.of(config, labels, batches, data)


@dataclass(frozen=True)
class Tokens(Validation):
    """tokens, targets [sequences, s]."""

    tokens: Tensor
    targets: Tensor
    micro_batch_size: int
    text_bytes: int

    @classmethod
    def of(
        cls,
        config: LanguageConfig,
        tokenizer: Tokenizer,
        batches: int | None,
        data: str | Path | None = None,
    ) -> Tokens:
        """See open_validation."""
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
    def samples(self) -> int:
        return len(self.tokens)

    @property
    def predictions(self) -> int:
        return self.targets.numel()

    @property
    def digest(self) -> str:
        whole = torch.cat([self.tokens, self.targets[:, -1:]], dim=1)
        return hashlib.sha256(repr(whole.shape).encode() + whole.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.micro_batch_size)

    def micro_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.micro_batch_size
        for pair in zip(self.tokens.split(size), self.targets.split(size), strict=True):
            yield pair[0].to(device), pair[1].to(device)
