"""Validation images, read as they are needed: see validation.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.config_images import DIGITS
from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.images.batches import image_batches
from matformer_dist.data.images.classes import ClassNames, check_same_classes
from matformer_dist.data.images.datasets import ValidationImages
from matformer_dist.data.images.finding import find_images, find_validation
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.data.labels import Labels
from matformer_dist.evaluation.validation import Validation


class Images(Validation):
    text_bytes = None

    def __init__(self, dataset: ValidationImages, micro_batch_size: int, workers: int) -> None:
        self.dataset, self.micro_batch_size, self.workers = dataset, micro_batch_size, workers

    @property
    def samples(self) -> int:
        return len(self.dataset)

    predictions = samples

    @property
    def digest(self) -> str:
        """Of where the images lie, which of them, their labels and sizes; of no pixel, since that
        would be to decode them all.
        """
        source, samples = self.dataset.part.source, self.dataset.samples
        described = json.dumps([source.path, self.dataset.preprocessing.to_dict()])
        digest = hashlib.sha256(described.encode())
        digest.update(samples.tobytes())
        digest.update(source.labels[samples].tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return -(-self.samples // self.micro_batch_size)

    def micro_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        whole = self.samples // self.micro_batch_size * self.micro_batch_size
        rest = self.samples - whole
        for consumed, size in ((0, self.micro_batch_size), (whole, rest)):
            if not size:
                continue
            batches = image_batches(
                self.dataset,
                consumed=consumed,
                micro_batch_size=size,
                data_parallel_rank=0,
                data_parallel_size=1,
                workers=self.workers if consumed == 0 else 0,
            )
            for images, labels in batches:
                yield images.to(device), labels.to(device)


def open_images(
    config: VisionConfig, labels: Labels, batches: int | None, data: str | Path | None
) -> Images:
    """See open_validation. UserError, too, where the images' classes are not the model's."""
    assert isinstance(labels, ClassNames)
    settings, model = config.data, config.model
    if data is not None:
        settings = settings.model_copy(update={"validation": str(data), "split": None})
    if settings.validation is None and settings.train != DIGITS:
        found = find_images(settings)
        check_same_classes(found.classes, labels)
        part = found.validation
    else:
        part = find_validation(settings, labels)
    preprocessing = Preprocessing.of(settings, model.image_size, model.channels)
    validation = ValidationImages(part, preprocessing, config.validation_images(batches))
    return Images(validation, config.training.micro_batch_size, config.data.workers)
