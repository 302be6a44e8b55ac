"""What a run asks of its task, language or vision: data, labels, the model's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch.utils.data import Dataset

from matformer_dist.config import Config
from matformer_dist.config_language import LanguageConfig
from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.feed import Batch
from matformer_dist.parallel.topology import Topology


class Task(ABC):
    """`outputs`: rows of the model's head, tokens or classes; `labels_sha256`: what they mean,
    and `label_files`: files by name that say it, for the run directory. `data_sha256`: of what
    decides, beside the settings, which training sample comes when (their number and labels, or the
    lengths of token files; not what is in them); `datasets` sets it, and `data_in_words`.
    """

    outputs: int
    labels_sha256: str
    data_sha256: str
    data_in_words: str
    label_files: Mapping[str, bytes]
    deal: ClassVar[Callable[..., Iterator[Batch]]]  # batches of a data set: see micro_batches

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def datasets(
        self, train_samples: int, topology: Topology
    ) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Training data of that many samples, and those of an evaluation.

        To be called by all ranks; UserError, on all, for data that do not fit.
        """

    @abstractmethod
    def probe(self) -> Batch:
        """One made-up sample and its targets, always the same: see continuity.py."""

    def micro_batches(
        self, dataset: Dataset[Any], consumed: int, topology: Topology
    ) -> Iterator[Batch]:
        """Of this rank, behind `consumed` samples of the dataset."""
        return self.deal(
            dataset,
            consumed=consumed,
            micro_batch_size=self.config.training.micro_batch_size,
            data_parallel_rank=topology.data_rank,
            data_parallel_size=topology.data_size,
            workers=self.config.data.workers,
        )


def open_task(config: Config) -> Task:
    """To be called by all ranks; UserError, on all, where the tokenizer or the images are not
    there, or not as configured.
    """
    if isinstance(config, VisionConfig):
        from matformer_dist.training.vision import VisionTask  # Pillow, for images alone

        return VisionTask(config)
    from matformer_dist.training.language import LanguageTask

    assert isinstance(config, LanguageConfig)
    return LanguageTask(config)
