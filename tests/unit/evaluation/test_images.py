"""Validation images of a trained encoder are taken as its training took them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from matformer_dist.config_file import validate_config
from matformer_dist.config_vision import VisionConfig
from matformer_dist.data.images.classes import ClassNames
from matformer_dist.errors import UserError
from matformer_dist.evaluation.images import Images, open_images
from tests.unit.data.images.pictures import write_folder, write_parquet, write_shard

NAMES = ("ant", "bee", "cat")


def opened(data: dict[str, Any], other: Path | None = None) -> Images:
    config = validate_config(
        {
            "task": "vision",
            "run": {"dir": "unused"},
            "model": {"preset": "tiny"},
            "data": {"train": "elsewhere", **data},
            "training": {"steps": 1, "micro_batch_size": 2, "global_batch_size": 2},
        },
        source="the test",
    )
    assert isinstance(config, VisionConfig)
    return open_images(config, ClassNames(NAMES, "run/classes.json"), None, other)


def test_what_training_takes_is_evaluated(tmp_path: Path) -> None:
    """Bare numbers without the last class; a folder beside training images in row groups."""
    numbers = write_shard(tmp_path / "n.tar", [1, 0])
    folder = write_folder(tmp_path / "f", dict.fromkeys(NAMES, 2))
    groups = {"shuffle": "row_groups"}
    cases: list[tuple[dict[str, Any], Path | None, int]] = [
        ({"validation": str(numbers)}, None, 2),
        ({"validation": str(folder), **groups}, None, 6),
        (groups, folder, 6),
        ({"split": 0.5}, numbers, 2),
    ]
    for data, other, count in cases:
        assert opened(data, other).samples == count


def test_other_classes_are_refused(tmp_path: Path) -> None:
    few = write_folder(tmp_path / "f", {"ant": 1, "bee": 1})
    many = write_shard(tmp_path / "m.tar", [0, 3])
    split = write_parquet(tmp_path / "s.parquet", [0, 1] * 20)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"validation": str(few)}, "f has not the classes cat, compared with run/classes.json"),
        ({"validation": str(many)}, "label 3 of s/000001.png .* is none of the 3 classes"),
        ({"train": str(split), "split": 0.5}, "are not those that the model was trained on, run/c"),
        ({"train": "digits"}, "has classes of its own 0, 1"),
    ]
    for data, says in cases:
        with pytest.raises(UserError, match=says):
            opened(data)
