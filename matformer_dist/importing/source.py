"""What an import asks of a checkpoint, a language model's or a vision encoder's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from matformer_dist.config import Config
from matformer_dist.config_file import validate_config
from matformer_dist.data.labels import Labels
from matformer_dist.importing.calibration import Calibration
from matformer_dist.importing.options import ImportOptions


class Source(ABC):
    """A checkpoint, opened and checked; weights come a layer at a time, by our names, in fp32.

    `config`: of the run that it becomes, with data.train left for the user to set; `note`: what
    stands above that; `outputs`: rows of the head, and `labels` what they mean.
    """

    config: Config
    note: str
    labels: Labels
    outputs: int

    @abstractmethod
    def read_samples(self) -> None:
        """Calibration's text or images; UserError where they cannot be used."""

    @property
    @abstractmethod
    def samples_in_words(self) -> str:
        """As in "8,192 tokens of calibration text"; empty where none were read."""

    @abstractmethod
    def embedding(self) -> dict[str, Tensor]:
        """By their names in the embedding."""

    @abstractmethod
    def calibration(self, embedding: dict[str, Tensor]) -> Calibration:
        """Of the samples that were read."""

    @abstractmethod
    def layer(self, i: int) -> dict[str, Tensor]:
        """By their names in a Block."""

    @abstractmethod
    def behind_layers(self) -> Iterator[tuple[str, Tensor]]:
        """Final norm and head, by their whole names."""

    @abstractmethod
    def notices(self) -> list[str]:
        """What the user should know."""


def run_config(tree: dict[str, Any], output: Path, options: ImportOptions) -> Config:
    """The settings of an imported run; UserError where they do not fit the model.

    tree: the task's own, of the sections model, data and training.
    """
    shared = {
        "run": {"dir": str(output)},
        "nesting": options.nesting(),
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 100, "min_lr": 1e-5},
    }
    return validate_config({**tree, **shared}, source="the imported model's configuration")
