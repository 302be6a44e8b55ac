from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matformer_dist.config_images import AugmentationConfig, ImageDataConfig
from matformer_dist.data.images.batches import image_batches, images_and_labels
from matformer_dist.data.images.datasets import image_datasets
from matformer_dist.data.images.finding import find_images
from matformer_dist.errors import LocalError, UserError
from tests.unit.data.images.pictures import (
    SIZE,
    Picture,
    flat,
    plain_config,
    rough,
    told,
    write_folder,
    write_parquet,
    write_shard,
)

LABELS = np.random.default_rng(0).integers(0, 4, 60).tolist()
AUGMENTED = AugmentationConfig(kind="light2", shift=1, rotate=15.0)
Seen = list[tuple[int, int]]


KINDS = ["folder", "parquet", "tar"]


def written(kind: str, folder: Path, picture: Picture = flat) -> Path:
    """60 pictures."""
    if kind == "folder":
        return write_folder(folder / "d", {"a": 20, "b": 7, "c": 33}, picture)
    if kind == "parquet":
        return write_parquet(folder / "d.parquet", LABELS, rows=5, picture=picture)
    return write_shard(folder / "d.tar", LABELS, picture=picture)


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return written(request.param, tmp_path)


def datasets(config: ImageDataConfig, train: int = 200, validation: int = 100) -> Any:
    return image_datasets(config, find_images(config), SIZE, 3, train, validation)


def batches(dataset: Any, consumed: int = 0, rank: int = 0, ranks: int = 1, **options: Any) -> Any:
    return image_batches(
        dataset,
        consumed=consumed,
        micro_batch_size=4,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **options,
    )


def rows(found: Any) -> list[tuple[bytes, int]]:
    """Samples, to the last bit."""
    return [
        (image.numpy().tobytes(), int(label[0]))
        for images, labels in found
        for image, label in zip(images, labels, strict=True)
    ]


def test_training_has_all_of_its_samples_every_epoch(path: Path) -> None:
    train, validation = datasets(plain_config(path, split=0.2))
    size = len(train.part.samples)
    assert (len(train), size, len(validation)) == (200, 48, 12)
    seen: Seen = []
    for image, label in (train[i] for i in range(3 * size)):
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
        assert told(image)[0] == label
        seen.append(told(image))
    held = [told(image) for image, _ in (validation[i] for i in range(12))]
    epochs = [seen[:size], seen[size : 2 * size], seen[2 * size :]]
    assert all(len(set(epoch)) == size and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert not set(held) & set(seen) and len({*held, *seen}) == 60
    assert held == sorted(held, key=(lambda one: one) if path.is_dir() else (lambda one: one[1]))


def test_batches_are_of_images_and_labels(path: Path) -> None:
    train, _ = datasets(plain_config(path))
    images, labels = next(batches(train))
    assert images.shape == (4, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert labels.shape == (4, 1) and labels.dtype == torch.int64
    assert [told(image)[0] for image in images] == labels[:, 0].tolist()
    assert rows([images_and_labels([train[i] for i in range(4)])]) == rows([(images, labels)])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_global_batch_depend_on_the_seed_alone(tmp_path: Path, kind: str) -> None:
    """Not on ranks, workers, global generators, the run's length or where it was resumed."""
    config = plain_config(written(kind, tmp_path, rough), augmentation=AUGMENTED)
    train, _ = datasets(config)
    alone = rows(batches(train))
    assert len(alone) == 200 and len(set(alone)) == 200
    for ranks in (2, 4):
        random.seed(ranks), torch.manual_seed(ranks)
        sources = [batches(train, 8, rank, ranks) for rank in range(ranks)]
        dealt = [row for step in zip(*sources, strict=True) for row in rows(step)]
        assert dealt == alone[8 : 8 + len(dealt)] and len(dealt) >= 184
    longer, _ = datasets(config, train=900)
    assert rows(itertools.islice(batches(longer, 100), 25)) == alone[100:]
    assert rows(batches(train, 120, workers=2)) == alone[120:]
    other, _ = datasets(config.model_copy(update={"seed": 5}))
    assert len(set(rows(batches(other))) & set(alone)) < 10  # a crop may be of one pixel


def test_batches_leave_the_global_generators_alone(path: Path) -> None:
    train, _ = datasets(plain_config(path, augmentation=AUGMENTED))
    states = torch.get_rng_state(), random.getstate()
    next(batches(train))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_validation_is_all_or_spread_evenly(path: Path) -> None:
    config = plain_config(path, split=0.5, augmentation=AUGMENTED)
    _, whole = datasets(config, validation=10_000)
    assert len(whole) == 30
    everything = [told(whole[i][0]) for i in range(30)]
    assert len(set(everything)) == 30
    _, some = datasets(config, validation=10)
    assert [told(some[i][0]) for i in range(len(some))] == everything[::3]
    assert all(told(some[i][0])[0] == some[i][1] for i in range(10))
    assert len(image_datasets(config, find_images(config), SIZE, 3, 1, None)[1]) == 30


def test_row_groups_are_mixed_eight_at_a_time(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [0, 1] * 100, rows=5)
    train, _ = datasets(plain_config(path, shuffle="row_groups", split=0.1), train=360)
    numbers = [told(train[i][0])[1] for i in range(360)]
    assert len(set(numbers[:180])) == 180 and set(numbers[180:]) == set(numbers[:180])
    assert len({number // 5 for number in numbers[:34]}) == 8
    all_mixed, _ = datasets(plain_config(path, split=0.1), train=180)
    mixed = [told(all_mixed[i][0])[1] for i in range(180)]
    assert set(mixed) == set(numbers) and len({number // 5 for number in mixed[:34]}) > 15


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    folder = write_folder(tmp_path / "d", {"a": 20, "b": 20})
    train, _ = datasets(plain_config(folder), train=39)
    at = next(i for i in range(39) if train.part.samples[train.order(i)] == 25)
    broken = folder / "b" / "0005.png"
    broken.write_bytes(broken.read_bytes()[:45])
    found = batches(train, workers=workers)
    for _ in range(at // 4):
        next(found)
    with pytest.raises(LocalError) as raised:
        next(found)
    assert str(raised.value).startswith(f"{broken} holds no image that can be decoded: ")
    assert "Traceback" not in str(raised.value) and "\n" not in str(raised.value)


def test_digits_need_no_other_setting() -> None:
    config = ImageDataConfig(train="digits")
    found = find_images(config)
    train, validation = image_datasets(config, found, 8, 1, 3000, None)
    assert (len(train), len(validation)) == (3000, 355)
    images, labels = next(batches(validation))
    assert images.shape == (4, 1, 8, 8) and images.min() == -1 and images.max() == 1
    counts = Counter(validation[i][1] for i in range(355))
    assert set(counts) == set(range(10)) and max(counts.values()) - min(counts.values()) <= 2
    larger, _ = image_datasets(config, found, 16, 3, 10, 10_000)
    assert larger[0][0].shape == (3, 16, 16) and labels.max() < 10


def test_settings_that_do_not_fit_the_model_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"data.mean has 3 values.* have 1 channels"):
        image_datasets(plain_config(path), find_images(plain_config(path)), SIZE, 1, 10, 10)
    config = plain_config(path, augmentation=AugmentationConfig(shift=SIZE))
    with pytest.raises(UserError, match="shift 6 moves images of 6 pixels out of sight"):
        datasets(config)
