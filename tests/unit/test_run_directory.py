"""Which of a run's checkpoints count, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.errors import UserError
from matformer_dist.run_directory import (
    UnknownStateError,
    find_checkpoint,
    read_checkpoints,
    seal,
)
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5 and 20."""
    lm = random_model(model_config())
    write_run(tmp_path, lm, step=20)
    return write_run(tmp_path, lm, step=5)


def manifest(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step}/manifest.json"


def test_the_newest_is_found_and_any_can_be_named(run: Path) -> None:
    assert find_checkpoint(run).step == 20
    assert find_checkpoint(f"{run}@5").step == 5
    assert find_checkpoint(run / "checkpoints/step-5").step == 5
    (run / "checkpoints/step-30.incomplete").mkdir()
    assert find_checkpoint(run).step == 20


def test_a_damaged_newest_checkpoint_is_no_reason_to_take_an_older_one_unasked(run: Path) -> None:
    manifest(run, 20).unlink()
    with pytest.raises(UserError, match=r"step-20 is not a whole .* complete are: .*@5$"):
        find_checkpoint(run)
    with pytest.raises(UserError, match=r"step-20 is not a whole .*; choose another"):
        find_checkpoint(f"{run}@20")
    assert [checkpoint.step for checkpoint in read_checkpoints(run).complete] == [5]
    assert list(read_checkpoints(run).damaged) == [20]


def test_a_damaged_older_checkpoint_does_not_matter(run: Path) -> None:
    manifest(run, 5).unlink()
    assert find_checkpoint(run).step == 20


def _set(key: str, value: Any) -> Any:
    return lambda raw: {**raw, key: value}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("format", 7), "has format 7, this version of matformer_dist reads format 2"),
        (_set("files", {"a": 3}), r"in its manifest.json, files.a is wrong"),
        (_set("files", {"a": {"bytes": 3, "sha256": ""}}), "a is missing"),
        (_set("layout", {"tensor": 2}), "layout.data is wrong"),
        (_set("nesting", {"widths": [3, 2], "names": ["S", "XL"]}), "nesting.* is wrong"),
        (lambda raw: [raw], "its manifest.json is not one"),
        (lambda raw: {k: raw[k] for k in raw if k != "step"}, "step is wrong"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(run: Path, change: Any, says: str) -> None:
    path = manifest(run, 5)
    path.write_bytes(seal(json.dumps(change(json.loads(path.read_text()))).encode()))
    with pytest.raises(UserError, match=says):
        find_checkpoint(f"{run}@5")


def test_a_manifest_of_format_1_is_read_under_the_names_of_today(run: Path) -> None:
    """It was written before there were encoders of images; all that is in it is kept."""
    path = manifest(run, 5)
    today = read_checkpoints(run).complete[0].manifest
    raw = json.loads(path.read_text())
    before = {"samples": "consumed_sequences", "units": "tokens", "outputs": "vocab_size",
              "labels_sha256": "tokenizer_sha256"}  # fmt: skip
    assert before.keys() <= raw.keys()
    old = {before.get(key, key): value for key, value in raw.items()} | {"format": 1}
    path.write_bytes(seal(json.dumps(old, indent=1).encode()))
    found = find_checkpoint(f"{run}@5").manifest
    assert found.model_copy(update={"manifest_sha256": today.manifest_sha256}) == today
    path.write_bytes(path.read_bytes().replace(b'"step": 5', b'"step": 6'))
    with pytest.raises(UserError, match="not as it was written"):
        find_checkpoint(f"{run}@5")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{run}@x", "must be a number"),
        ("{run}@6", r"@6 is not there; checkpoints are: .*@5, .*@20$"),
        ("absent", "no run directory"),
    ],
)
def test_what_is_not_there_is_named(run: Path, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        find_checkpoint(name.format(run=run))


def test_an_extracted_model_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "submodel.json").touch()
    with pytest.raises(UserError, match=r"is an extracted model, which has no checkpoint; give"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_out_of_reach_is_not_passed_over(run: Path) -> None:
    """Taking an older one would lose steps that are there."""
    path = manifest(run, 20)
    path.unlink()
    path.symlink_to(path)  # reading it fails, by root too
    with pytest.raises(UnknownStateError, match=r"step-20 cannot be read .*: Too many levels"):
        read_checkpoints(run)


def test_checkpoints_out_of_reach_are_not_taken_for_none(tmp_path: Path) -> None:
    """Else a run would begin anew."""
    (tmp_path / "checkpoints").touch()  # for a folder that may not be read, as root may read all
    for find in (read_checkpoints, find_checkpoint):
        with pytest.raises(NotADirectoryError):
            find(tmp_path)
    (tmp_path / "checkpoints").unlink()
    assert not read_checkpoints(tmp_path).complete
