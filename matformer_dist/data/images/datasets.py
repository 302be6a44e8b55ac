"""Images as torch's map-style datasets.

Which samples make up global batch n, and what augmentation makes of each, depends on the data,
data.seed and n alone: not on ranks, workers, the length of the run, or where it was resumed.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from matformer_dist.config_images import ImageDataConfig
from matformer_dist.data.images.augmentation import Augmentation
from matformer_dist.data.images.finding import FoundImages, Part
from matformer_dist.data.images.order import Indices, Order, spread
from matformer_dist.data.images.preprocessing import Preprocessing

Sample = tuple[Tensor, int]  # fp32 [C, image_size, image_size], and its label


class TrainingImages(Dataset[Sample]):
    """Sample i is position i % size of epoch i // size, augmented by draws of its own.

    LocalError for an image that cannot be read: other ranks do not know of it.
    """

    def __init__(
        self,
        part: Part,
        augmentation: Augmentation,
        config: ImageDataConfig,
        count: int,
    ) -> None:
        self.part, self.augmentation, self.count = part, augmentation, count
        groups = _groups(part) if config.shuffle == "row_groups" else None
        self.order = Order(len(part.samples), config.seed, groups)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        source, sample = self.part.source, int(self.part.samples[self.order(index)])
        image = source.image(sample, self.augmentation.preprocessing.channels)
        return self.augmentation(image, index), int(source.labels[sample])


class ValidationImages(Dataset[Sample]):
    """In the order of the data: `count` of them, evenly spread, or all (None). Without chance.

    LocalError for an image that cannot be read.
    """

    def __init__(self, part: Part, preprocessing: Preprocessing, count: int | None) -> None:
        self.part, self.preprocessing = part, preprocessing
        self.samples = part.samples[spread(len(part.samples), count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        source, sample = self.part.source, int(self.samples[index])
        image = source.image(sample, self.preprocessing.channels)
        pixels = self.preprocessing.normalized(self.preprocessing.cropped(image))
        return pixels, int(source.labels[sample])


def image_datasets(
    config: ImageDataConfig,
    found: FoundImages,
    image_size: int,
    channels: int,
    train_samples: int,
    validation_samples: int | None,
) -> tuple[TrainingImages, ValidationImages]:
    """Training data of `train_samples`, passed over as often as that takes, and validation data of
    `validation_samples`, or all where there are fewer, or None are asked for.

    found: what `find_images(config)` gave. UserError for settings that do not fit the model's
    image_size and channels (1 or 3).
    """
    preprocessing = Preprocessing.of(config, image_size, channels)
    augmentation = Augmentation(config.augmentation, preprocessing, config.seed)
    train = TrainingImages(found.train, augmentation, config, train_samples)
    return train, ValidationImages(found.validation, preprocessing, validation_samples)


def _groups(part: Part) -> Indices:
    """Positions in `part.samples` at which those of another row group begin."""
    assert part.source.groups is not None  # checked where it was found
    starts: Indices = np.searchsorted(part.samples, part.source.groups)
    return np.unique(starts[starts < len(part.samples)])
