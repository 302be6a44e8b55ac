from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.data.images.digits import DigitsSource
from matformer_dist.data.images.finding import FoundImages, find_images
from matformer_dist.data.images.folder import FolderSource
from matformer_dist.data.images.parquet import ParquetSource
from matformer_dist.data.images.tar_shards import TarSource
from matformer_dist.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.unit.data.images.pictures import (
    flat,
    plain_config,
    write_folder,
    write_parquet,
    write_shard,
)

NAMES = ["ant", "bee", "cat"]
LABELS = [0, 1, 2] * 20


def found(train: object, **keys: Any) -> FoundImages:
    return find_images(plain_config(train, **keys))


def failing(message: str, train: object, **keys: Any) -> None:
    with pytest.raises(UserError, match=message):
        found(train, **keys)


def test_each_kind_is_known_by_what_is_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", {"a": 20, "b": 30})
    for i in range(3):
        write_parquet(tmp_path / "parquet" / f"train-{i}.parquet", LABELS)
        write_shard(tmp_path / "tar" / f"{i}.tar", LABELS)
    write_parquet(tmp_path / "parquet" / "test-0.parquet", LABELS)
    cases: list[tuple[object, type, int]] = [
        (tmp_path / "folder", FolderSource, 50),
        (tmp_path / "parquet", ParquetSource, 240),
        (tmp_path / "parquet" / "train-*.parquet", ParquetSource, 180),
        (tmp_path / "**" / "*1.parquet", ParquetSource, 60),
        (tmp_path / "parquet" / "train-0.parquet", ParquetSource, 60),
        (tmp_path / "tar", TarSource, 180),
        (tmp_path / "tar" / "[01].tar", TarSource, 120),
        ("digits", DigitsSource, 1442),
    ]
    for train, kind, count in cases:
        images = found(train)
        assert type(images.train.source) is kind
        assert len(images.train.source) == count


def test_validation_is_digits_own(tmp_path: Path) -> None:
    images = found("digits")
    assert len(images.train.samples) == 1442 and len(images.validation.samples) == 355
    assert images.classes.names == tuple("0123456789")
    write_folder(tmp_path, {str(digit): 2 for digit in range(10)})
    images = found(tmp_path, validation="digits")
    assert len(images.train.samples) == 20 and len(images.validation.samples) == 355


def test_a_share_of_train_is_held_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", LABELS)
    images = found(path, split=0.25)
    train, validation = images.train.samples.tolist(), images.validation.samples.tolist()
    assert len(validation) == 15 and sorted(train + validation) == list(range(60))
    assert found(path, split=0.25).validation.samples.tolist() == validation
    assert found(path, split=0.25, seed=9).validation.samples.tolist() != validation
    assert len(found(path).validation.samples) == 1  # 2%
    assert images.train.source is not images.validation.source
    failing(
        "data.split 0.002 of the 60 images .* leaves 60 for training and 0 for", path, split=0.002
    )
    failing("leaves 0 for training and 60 for validation", path, split=0.999)


def test_validation_of_its_own_is_used_whole(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "a.parquet", LABELS, names=NAMES)
    validation = write_folder(tmp_path / "v", dict.fromkeys(NAMES, 2))
    images = found(train, validation=str(validation))
    assert (len(images.train.samples), len(images.validation.samples)) == (60, 6)
    assert images.classes.names == tuple(NAMES)
    numbers = write_shard(tmp_path / "n.tar", [2, 0])  # bare numbers count the names
    assert found(train, validation=str(numbers)).validation.source.labels.tolist() == [2, 0]


def test_classes_of_validation_must_be_those_of_training(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "t", dict.fromkeys(NAMES, 2))

    cases: list[tuple[list[str], str]] = [
        (["ant", "bee"], "has not the classes cat, compared with .*/t; both must"),
        ([*NAMES, "dog"], "has classes of its own dog, compared"),
        ([f"c{i}" for i in range(9)], "its own c0, c1, c2, c3, c4, ...; not the classes ant"),
    ]
    for number, (names, says) in enumerate(cases):
        other = write_folder(tmp_path / str(number), dict.fromkeys(names, 1))
        failing(says, train, validation=str(other))
    other = write_parquet(tmp_path / "o.parquet", LABELS, names=NAMES[::-1])
    failing("has the same classes in another order, compared", train, validation=str(other))
    few = write_shard(tmp_path / "f.tar", [0, 2, 3, 4])
    failing(
        r"label 3 of s/000002.png in .*f.tar is none of the 3 classes, 0 to 2 \(2 such labels",
        train, validation=str(few),
    )  # fmt: skip


def test_bare_numbers_beside_names_that_are_other_numbers_are_refused(tmp_path: Path) -> None:
    """Folders 0 to 10 are classes in the order of text: label 2 would be the folder 10."""
    train = write_folder(tmp_path / "t", {str(number): 1 for number in range(11)})
    numbers = write_shard(tmp_path / "n.tar", [2, 10])
    failing(
        r"n.tar are bare numbers, .*another order \(0, 1, 10, 2, ...\), so .* name folders 000",
        train, validation=str(numbers),
    )  # fmt: skip
    ten = write_folder(tmp_path / "ten", {str(number): 1 for number in range(10)})
    few = write_shard(tmp_path / "m.tar", [2, 9])
    assert found(ten, validation=str(few)).validation.source.labels.tolist() == [2, 9]


def test_parts_are_the_same_images_however_they_are_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"x": 2, "y": 1})
    write_folder(tmp_path / "b", {"x": 2, "y": 1})
    (tmp_path / "link").symlink_to(tmp_path / "a")
    write_shard(tmp_path / "s.tar", LABELS)
    write_parquet(tmp_path / "p.parquet", LABELS)
    cases = [
        ("a", "a/", True), ("a", "b/../a", True), ("a", "link", True), ("a", "b", False),
        ("s.tar", "*.tar", True), ("p.parquet", "./p.parquet", True),
        ("s.tar", "p.parquet", False),
    ]  # fmt: skip
    for one, other, same in cases:
        images = found(f"{tmp_path}/{one}", validation=f"{tmp_path}/{other}")
        assert images.train.is_of(images.validation) == same, (one, other)
    digits = found("digits")
    assert not digits.train.is_of(digits.validation) and digits.train.is_of(digits.train)
    halves = found(tmp_path / "s.tar", split=0.5)
    assert not halves.train.is_of(halves.validation)


def test_labels_outside_of_the_names_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*LABELS, 3], names=NAMES)
    failing(r"label 3 of row 60 of .*a.parquet is none of the 3 classes, 0 to 2 \(1 such", path)
    path = write_shard(tmp_path / "b.tar", [1, 0, -1])
    failing(r"label -1 of s/000002.png in .*b.tar is none of the 2 classes", path)
    path = write_shard(tmp_path / "c.tar", [1, 5_000_000])
    failing(r"label 5000000 of s/000001.png in .*c.tar would make as many classes", path)
    failing("holds the one class '0'", write_shard(tmp_path / "d.tar", [0, 0]))


def test_places_without_images_are_named(tmp_path: Path) -> None:
    failing("data.train is '.*/none', and nothing is there; it may be digits, a", tmp_path / "none")
    failing(r"data.train is '.*/\*.tar', and nothing is there", tmp_path / "*.tar")
    failing("holds no images: neither class folders", tmp_path)
    write_folder(tmp_path / "t", {"a": 10, "b": 10})
    failing("data.validation is 'none', and", tmp_path / "t", validation="none")
    flat(0, 0).save(tmp_path / "x.png")
    failing("takes in .*/x.png, which is of no known kind; it may be", tmp_path / "x.png")
    failing("is of no known kind", tmp_path / "*")
    write_parquet(tmp_path / "m" / "a.parquet", LABELS)
    write_shard(tmp_path / "m" / "a.tar", LABELS)
    failing("takes in .parquet and .tar files; name one kind", tmp_path / "m")
    failing("e.parquet holds no images in its 1 files", write_parquet(tmp_path / "e.parquet", []))
    failing("e.tar holds no images in its 1 files", write_shard(tmp_path / "e.tar", []))
    failing(
        "shuffle is row_groups, and data.train .* has none", tmp_path / "t", shuffle="row_groups"
    )


def test_a_place_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", LABELS)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("matformer_dist.data.images.tar_shards.tarfile.open", denied)
    failing(f"cannot use {path}: Permission denied; what is read must be readable", path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    failing(
        r"images need Pillow .*; install it by `pip install 'matformer-dist\[vision\]'`", "digits"
    )


def on_a_rank(path: str) -> tuple[Any, ...]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        images = found(path, split=0.1)
    except UserError as error:
        return (str(error),)
    finally:
        dist.destroy_process_group()
    part = images.validation
    pixel = part.source.image(int(part.samples[0]), 3).getpixel((0, 0))
    return images.classes.digest, part.samples.tolist(), part.source.labels.tolist(), pixel


def test_all_ranks_are_told_what_the_main_rank_finds(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", LABELS)
    ranks = run_ranks(2, on_a_rank, str(path))
    assert ranks[0] == ranks[1] and len(ranks[0]) == 4
    failed = run_ranks(2, on_a_rank, str(tmp_path / "none"))
    assert failed[0] == failed[1] and "nothing is there" in failed[0][0]
