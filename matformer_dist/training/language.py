"""The task language: tokens of prepared text."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.datasets import build_datasets, micro_batches, sizes_digest
from matformer_dist.data.feed import Batch
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.parallel.agreement import agreement, on_main
from matformer_dist.parallel.topology import Topology
from matformer_dist.training.task import Task


class LanguageTask(Task):
    config: LanguageConfig
    deal = staticmethod(micro_batches)

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        with agreement():  # every rank reads its own
            self.tokenizer = load_tokenizer(config.data.tokenizer)
            self.outputs = check_vocabulary(config, self.tokenizer)
        self.labels_sha256 = self.tokenizer.digest
        self.label_files = self.tokenizer.files

    def datasets(
        self,
        train_samples: int,
        topology: Topology,  # noqa: ARG002
    ) -> tuple[Dataset[Any], Dataset[Any] | None]:
        batch = self.config.training.global_batch_size
        samples = self.config.evaluation.batches * batch
        datasets = build_datasets(self.config, self.tokenizer, train_samples, samples)
        blend = self.config.data.train
        self.data_sha256 = on_main(lambda: sizes_digest(blend))
        self.data_in_words = ", ".join(f"{weight:g} x {prefix}" for weight, prefix in blend)
        return datasets

    def probe(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.config.training.seq_len + 1)
        ids = torch.randint(self.outputs, shape, generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def check_vocabulary(config: LanguageConfig, tokenizer: Tokenizer) -> int:
    """The model's vocabulary size; UserError where the configuration's is not the tokenizer's."""
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer "
            f"{config.data.tokenizer} has {tokenizer.vocab_size} pieces; leave model.vocab_size "
            "out, or set data.tokenizer to the one that the model is meant for"
        )
    return tokenizer.vocab_size
