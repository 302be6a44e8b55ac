"""Retrieval of a run's encoder with images of its own, or with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from matformer_dist.errors import UserError
from matformer_dist.evaluation.retrieve import ImagesAsked, retrieve
from matformer_dist.submodels.extract import extract
from tests.unit.data.images.pictures import rough, write_folder
from tests.unit.submodels.synthetic_vision_run import (
    CLASSES,
    random_vit,
    vision_config,
    write_vision_run,
)


def test_other_images_need_not_lie_as_the_runs(tmp_path: Path) -> None:
    """In row groups, which folders have none of; where those are is of no matter."""
    data = {"shuffle": "row_groups"}
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()), data=data)
    gallery = write_folder(tmp_path / "gallery", dict.fromkeys(CLASSES.names, 3), rough)
    asked = ImagesAsked(str(gallery), str(gallery))
    _, result = retrieve(str(run), images=asked, ks=(1,), backend="torch", device="cpu")
    assert (result.gallery, result.queries) == (15, 15)
    assert result.leave_one_out, "an image would be its own nearest neighbour"
    with pytest.raises(UserError, match=r"are both .*give the same --gallery-images and --query"):
        retrieve(str(run), images=ImagesAsked(str(gallery), str(gallery), 10), device="cpu")
    with pytest.raises(UserError, match="give both, or neither"):
        retrieve(str(run), images=ImagesAsked(str(gallery)), device="cpu")


def test_an_encoder_that_was_trained_apart_is_a_run(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    (one,) = extract(str(run), ["S"], output=tmp_path / "s")
    with pytest.raises(UserError, match=r"--independent .*/s is an extracted model; give a run"):
        retrieve(str(run), independents=[str(one.path)], device="cpu")
    (tmp_path / "other name").symlink_to(run)
    with pytest.raises(UserError, match=r"other name is the run whose submodels are measured"):
        retrieve(str(run), independents=[str(tmp_path / "other name")], device="cpu")
