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
    asked = ImagesAsked(str(gallery), f"{gallery}/../gallery")
    _, result = retrieve(str(run), images=asked, ks=(1,), backend="torch", device="cpu")
    assert (result.gallery, result.queries) == (15, 15)
    assert result.leave_one_out, "an image would be its own nearest neighbour"
    with pytest.raises(UserError, match=r"queries are the gallery, .*give the same --gall"):
        retrieve(str(run), images=ImagesAsked(str(gallery), str(gallery), 10), device="cpu")
    with pytest.raises(UserError, match="give both, or neither"):
        retrieve(str(run), images=ImagesAsked(str(gallery)), device="cpu")


def test_images_of_new_classes_can_be_searched_but_the_runs_own_are_its_models(
    tmp_path: Path,
) -> None:
    new = write_folder(tmp_path / "new", {"newt": 4, "owl": 3}, rough)
    run = write_vision_run(
        tmp_path / "run", random_vit(vision_config()), data={"train": str(new), "split": 0.3}
    )
    asked = ImagesAsked(str(new), "digits")
    with pytest.raises(UserError, match="has classes of its own"):
        retrieve(str(run), images=asked, device="cpu")
    asked = ImagesAsked(str(new), str(new))
    _, result = retrieve(str(run), images=asked, ks=(1, 6), backend="torch", device="cpu")
    assert (result.gallery, result.leave_one_out) == (7, True)
    with pytest.raises(UserError, match="7 neighbours: k must be 1 to 6, the other gallery images"):
        retrieve(
            str(run), images=asked, ks=(7,), device="cpu", progress=lambda *_: pytest.fail("late")
        )
    with pytest.raises(UserError, match=r"classes of .*new are not those that the model was"):
        retrieve(str(run), device="cpu")


def test_digits_are_two_parts_by_one_name(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    asked = ImagesAsked("digits", "digits", gallery_images=40, query_images=20)
    _, result = retrieve(str(run), images=asked, ks=(1,), backend="torch", device="cpu")
    assert (result.gallery, result.queries, result.leave_one_out) == (40, 20, False)


def test_an_encoder_that_was_trained_apart_is_a_run(tmp_path: Path) -> None:
    run = write_vision_run(tmp_path / "run", random_vit(vision_config()))
    (one,) = extract(str(run), ["S"], output=tmp_path / "s")
    with pytest.raises(UserError, match=r"--independent .*/s is an extracted model; give a run"):
        retrieve(str(run), independents=[str(one.path)], device="cpu")
    (tmp_path / "other name").symlink_to(run)
    with pytest.raises(UserError, match=r"other name is the run whose submodels are measured"):
        retrieve(str(run), independents=[str(tmp_path / "other name")], device="cpu")
