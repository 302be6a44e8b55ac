"""Where a run begins, and which checkpoints and settings it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from matformer_dist.config import CheckpointConfig, load_config
from matformer_dist.errors import UserError
from matformer_dist.parallel.topology import Topology
from matformer_dist.run_directory import Manifest, find_checkpoint
from matformer_dist.training.checkpoint import CheckpointStore
from matformer_dist.training.setup import check_checkpoint, check_run_directory
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    lm = random_model(model_config())
    for step in (2, 4, 6):
        write_run(tmp_path, lm, step=step)
    return tmp_path


def store(run: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(run, CheckpointConfig(**settings), cast(Topology, None))


def step_of(run: Path, **settings: Any) -> int | None:
    checkpoint = store(run, **settings).choose_start().checkpoint
    return checkpoint.step if checkpoint else None


def test_a_new_run_begins_afresh(tmp_path: Path) -> None:
    assert step_of(tmp_path) is None
    assert step_of(tmp_path, resume="never") is None


def test_auto_takes_the_newest_whole_checkpoint_and_names_the_damaged_one(run: Path) -> None:
    assert step_of(run) == 6
    (run / "checkpoints/step-6/manifest.json").unlink()
    start = store(run).choose_start()
    assert start.checkpoint is not None and start.checkpoint.step == 4
    assert len(start.damaged) == 1 and "step-6 is not a complete checkpoint" in start.damaged[0]


def test_a_run_without_a_whole_checkpoint_does_not_begin_again(run: Path) -> None:
    for step in (2, 4, 6):
        (run / f"checkpoints/step-{step}/manifest.json").unlink()
    for resume, says in (("auto", "no checkpoint in .* is whole"), ("never", "holds checkpoints")):
        with pytest.raises(UserError, match=says):
            step_of(run, resume=resume)


def test_going_back_does_not_write_over_later_checkpoints(run: Path) -> None:
    with pytest.raises(UserError, match=r"holds later steps \(4, 6\)"):
        step_of(run, resume=f"{run}@2")
    assert step_of(run, resume=f"{run}@6") == 6
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoints/step-{step}")
    assert step_of(run, resume=f"{run}@2") == 2


def test_another_runs_checkpoint_can_be_gone_on_from(run: Path, tmp_path: Path) -> None:
    assert step_of(tmp_path / "fork", resume=f"{run}@4") == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": model_config(d_model=64)}, r"model.d_model \(was 32, now 64\)"),
        ({"model": model_config(rope_theta=5.0)}, "model.rope_theta"),
        ({"nesting": {"widths": [8, 24, 40, 64], "names": list("ABCD")}}, "nesting.widths .*names"),
        ({"vocab_size": 9}, "vocabulary"),
        ({"tokenizer_sha256": "0" * 64}, "SHA-256 of the tokenizer"),
        ({"precision": "bf16"}, "training.precision"),
        ({"layout": {"tensor": 2, "data": 1, "zero_stage": 0}}, "parallel.tensor was 1 and is now"),
        ({"layout": {"tensor": 1, "data": 3, "zero_stage": 0}}, "data-parallel ranks was 1"),
        ({"layout": {"tensor": 1, "data": 1, "zero_stage": 2}}, "stage was 0 and is now 2"),
    ],
)
def test_a_checkpoint_of_another_model_or_layout_is_refused(
    run: Path, change: dict[str, Any], says: str
) -> None:
    checkpoint = find_checkpoint(run)
    raw = checkpoint.manifest.model_dump(mode="json")
    with pytest.raises(UserError, match=says):
        check_checkpoint(checkpoint, Manifest.model_validate({**raw, **change}))


def test_what_trained_weights_do_not_depend_on_may_change(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    longer = model_config(max_seq_len=4096, init_std=1.0)
    check_checkpoint(checkpoint, checkpoint.manifest.model_copy(update={"model": longer}))


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=9",
        "training.compile=true",
        "training.activation_checkpointing=full",
        "data.tokenizer=elsewhere.model",
        "data.workers=2",
        "deepspeed.zero_optimization.stage=2",
        "logging.every=3",
    ],
)
def test_a_run_goes_on_with_settings_that_do_not_decide_its_weights(
    run: Path, override: str
) -> None:
    check_run_directory(load_config(run / "config.yaml", [override]))


@pytest.mark.parametrize(
    "override", ["optimizer.lr=0.5", "training.seed=3", "objective.kind=joint", "data.seed=3"]
)
def test_a_run_does_not_go_on_with_other_settings(run: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"{key} \(was .*, now '?{value}'?\)"):
        check_run_directory(load_config(run / "config.yaml", [override]))
    shutil.rmtree(run / "checkpoints")
    check_run_directory(load_config(run / "config.yaml", [override]))
