"""Batches of images and labels, dealt over ranks as those of text are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from matformer_dist.data.datasets import micro_batches
from matformer_dist.data.images.datasets import Sample
from matformer_dist.errors import UserError


def image_batches(
    dataset: Dataset[Sample],
    *,
    consumed: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images fp32 [b, C, H, W], labels int64 [b, 1]) of this rank, as `micro_batches` deals them.

    An image that cannot be read raises its LocalError where its batch would have come.
    """
    batches = micro_batches(
        _Caught(dataset),
        consumed=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        workers=workers,
        collate=_collated,
    )
    return map(_raised, batches)


def images_and_labels(samples: Iterable[Sample]) -> tuple[Tensor, Tensor]:
    """Images fp32 [b, C, H, W], labels int64 [b, 1]."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64).unsqueeze(1)


class _Caught(Dataset[Any]):
    """A sample, or the UserError it raises: a worker's would be raised inside a traceback."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _collated(samples: Iterable[Sample | UserError]) -> tuple[Tensor, Tensor] | UserError:
    whole: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        whole.append(sample)
    return images_and_labels(whole)


def _raised(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, UserError):
        raise batch
    images, labels = batch
    return images, labels
