"""The task vision: labelled images."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.feed import Batch
from matformer_dist.data.images.batches import image_batches
from matformer_dist.data.images.classes import ClassNames
from matformer_dist.data.images.datasets import image_datasets
from matformer_dist.data.images.finding import find_images
from matformer_dist.errors import UserError
from matformer_dist.models.head import IGNORED_TARGET
from matformer_dist.parallel.topology import Topology
from matformer_dist.training.task import Task


class VisionTask(Task):
    config: VisionConfig
    deal = staticmethod(image_batches)

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.found = find_images(config.data)
        self.outputs = check_classes(config, self.found.classes)
        self.labels_sha256 = self.found.classes.digest
        self.label_files = self.found.classes.files

    def datasets(
        self, train_samples: int, topology: Topology
    ) -> tuple[Dataset[Any], Dataset[Any] | None]:
        config, data = self.config, self.found.train
        labels = data.source.labels[data.samples]
        self.data_in_words = (
            f"{config.data.train}: {len(labels):,} images to train on, "
            f"{len(self.found.validation.samples):,} to validate on, of {self.outputs:,} classes"
        )
        self.data_sha256 = sha256(data.samples.tobytes() + labels.tobytes()).hexdigest()
        train, validation = image_datasets(
            config.data,
            self.found,
            config.model.image_size,
            config.model.channels,
            train_samples,
            config.validation_images(),
        )
        unit = config.training.micro_batch_size * topology.data_size
        return train, _FilledUp(validation, unit)

    def probe(self) -> Batch:
        model = self.config.model
        size = (1, model.channels, model.image_size, model.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        return images, torch.zeros(1, 1, dtype=torch.long)


class _FilledUp(Dataset[tuple[Tensor, int]]):
    """A data set with images behind its last that have no class, up to a multiple of `unit`: so
    every rank has as many, and none is left out.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, int]], unit: int) -> None:
        self.dataset = dataset
        self.real = len(dataset)  # type: ignore[arg-type]
        self.size = -(-self.real // unit) * unit

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index < self.real:
            return self.dataset[index]
        return self.dataset[0][0], IGNORED_TARGET


def check_classes(config: VisionConfig, classes: ClassNames) -> int:
    """The model's number of classes; UserError where the configuration's is not the data's."""
    if config.model.classes not in (None, len(classes)):
        raise UserError(
            f"model.classes is {config.model.classes}, but {classes.source} has {len(classes)}; "
            "leave model.classes out, or set data.train to the images that the model is meant for"
        )
    return len(classes)
