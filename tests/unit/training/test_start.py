"""Where a run begins, and which checkpoints and settings it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from matformer_dist.checkpoints.store import CheckpointStore, _check_files
from matformer_dist.config import CheckpointConfig
from matformer_dist.config_file import load_config, validate_config
from matformer_dist.config_language import as_language
from matformer_dist.errors import UserError
from matformer_dist.models.forward_pass import Pass
from matformer_dist.run_directory import Layout, Manifest, find_checkpoint, seal
from matformer_dist.training.loop import _in_order
from matformer_dist.training.setup import check_checkpoint, check_run_directory
from tests.unit.submodels.synthetic_run import model_config, random_model, write_run
from tests.unit.submodels.synthetic_vision_run import random_vit, vision_config, write_vision_run

SETTINGS = as_language(
    validate_config(
        {
            "run": {"dir": "unused"},
            "model": {"d_model": 8, "n_layers": 1, "n_heads": 1, "d_ff": 8},
            "data": {"train": [[1, "unused"]], "tokenizer": "unused"},
            "training": {
                "steps": 5,
                "seq_len": 8,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "precision": "fp32",
            },
        },
        "test",
    ),
    "the test",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    lm = random_model(model_config())
    for step in (2, 4, 6):
        write_run(tmp_path, lm, step=step)
    return tmp_path


def store(run: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(run, CheckpointConfig(**settings))


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
    assert len(start.damaged) == 1 and "step-6 is not a whole checkpoint" in start.damaged[0]


def test_a_run_without_a_whole_checkpoint_does_not_begin_again(run: Path) -> None:
    for step in (2, 4, 6):
        (run / f"checkpoints/step-{step}/manifest.json").unlink()
    for resume, says in (("auto", "no checkpoint in .* is whole"), ("never", "holds checkpoints")):
        with pytest.raises(UserError, match=says):
            step_of(run, resume=resume)


def test_a_checkpoint_of_another_version_is_not_passed_over(run: Path) -> None:
    path = run / "checkpoints/step-6/manifest.json"
    raw = path.read_bytes().replace(b'"format": 2', b'"format": 3')
    path.write_bytes(seal(raw))
    with pytest.raises(UserError, match="has format 3"):
        step_of(run)
    path.write_bytes(raw)  # not as it was written: damaged, of whatever version
    assert step_of(run) == 4


@pytest.mark.parametrize(
    ("layout", "names", "says"),
    [
        ((2, 2, 0), ["mp_rank_00_model_states.pt"], "1 files of model states"),
        (
            (1, 2, 1),
            ["mp_rank_00_model_states.pt", "zero_pp_rank_0_optim_states.pt"],
            "1 files of opt",
        ),
        ((1, 2, 3), ["zero_pp_rank_0_mp_rank_00_model_states.pt"], "1 files of model .* 2 were"),
    ],
)
def test_a_checkpoint_without_the_files_of_all_nodes_is_none(
    tmp_path: Path, layout: tuple[int, int, int], names: list[str], says: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    tensor, data, stage = layout
    with pytest.raises(UserError, match=says):
        _check_files(tmp_path, Layout(tensor=tensor, data=data, zero_stage=stage))


def test_batches_are_put_in_the_order_of_their_pass() -> None:
    plain = Pass((), False, (), (), ())
    passes = [replace(plain, order=(2, 0, 1)), plain]
    batch = (torch.arange(6).view(3, 2), torch.arange(6).view(3, 2) + 1)
    more = iter([batch, batch, batch])
    (tokens, targets), (as_they_came, _) = _in_order(more, passes)
    assert tokens.tolist() == [[4, 5], [0, 1], [2, 3]]
    assert torch.equal(targets, tokens + 1) and torch.equal(as_they_came, batch[0])
    assert len(list(more)) == 1, "the next step's batch stays where it is"


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
        ({"model": model_config(n_kv_heads=2)}, r"model.n_kv_heads \(was 4, now 2\)"),
        ({"nesting": {"widths": [8, 24, 40, 64], "names": list("ABCD")}}, "nesting.widths .*names"),
        ({"outputs": 9}, "tokens or classes"),
        ({"labels_sha256": "0" * 64}, "SHA-256 of the tokenizer"),
        ({"precision": "bf16"}, "training.precision"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    run: Path, change: dict[str, Any], says: str
) -> None:
    checkpoint = find_checkpoint(run)
    raw = checkpoint.manifest.model_dump(mode="json")
    with pytest.raises(UserError, match=says):
        check_checkpoint(checkpoint, Manifest.model_validate({**raw, **change}), SETTINGS)


def test_a_checkpoint_of_another_task_is_refused_as_such(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    now = checkpoint.manifest.model_copy(update={"model": vision_config()})
    with pytest.raises(UserError, match=r"is of task: language, this run of task: vision; choose"):
        check_checkpoint(checkpoint, now, SETTINGS)


def test_what_trained_weights_do_not_depend_on_may_change(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    # The last two say what is meant without them: an imported checkpoint's say so.
    longer = model_config(max_seq_len=4096, init_std=1.0, n_kv_heads=4, kv_channels=8)
    check_checkpoint(checkpoint, checkpoint.manifest.model_copy(update={"model": longer}), SETTINGS)


@pytest.mark.parametrize(
    ("key", "says"),
    [("global_batch_size", "training.global_batch_size"), ("seq_len", "tokens a sample")],
)
def test_another_batch_is_refused_because_steps_count_data(run: Path, key: str, says: str) -> None:
    checkpoint = find_checkpoint(run)
    training = SETTINGS.training.model_copy(update={key: 2})
    other = SETTINGS.model_copy(update={"training": training})
    with pytest.raises(UserError, match=rf"{says} \(was \d, now 2\)"):
        check_checkpoint(checkpoint, checkpoint.manifest, other)


@pytest.mark.parametrize(
    "override",
    [
        "training.compile=true",
        "training.activation_checkpointing=full",
        "training.activation_checkpointing=selective",
        "model.n_kv_heads=4",
        "model.kv_channels=8",
        "data.prefetch=0",
        "data.tokenizer=elsewhere.model",
        "data.workers=2",
        "deepspeed.zero_optimization.stage=2",
        "logging.every=3",
    ],
)
def test_a_run_goes_on_with_settings_that_do_not_decide_its_weights(
    run: Path, override: str
) -> None:
    assert check_run_directory(load_config(run / "config.yaml", [override])) == []


def test_whoever_changes_a_runs_length_is_told_what_that_does(run: Path) -> None:
    longer = load_config(run / "config.yaml", ["training.steps=9"])
    assert "was 5 steps and is now 9" in check_run_directory(longer)[0]
    constant = (run / "config.yaml").read_text() + "schedule: {kind: constant}\n"
    (run / "config.yaml").write_text(constant)
    assert check_run_directory(load_config(run / "config.yaml", ["training.steps=9"])) == []


@pytest.mark.parametrize(("mixup", "told"), [(0.2, 1), (0.0, 0)])
def test_whoever_changes_what_is_mixed_is_told(mixup: float, told: int, tmp_path: Path) -> None:
    write_vision_run(tmp_path, random_vit(vision_config()))
    file = tmp_path / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["objective"] = {"kind": "joint", "mixup": mixup}
    tree["training"] |= {"micro_batch_size": 2, "global_batch_size": 4}
    file.write_text(yaml.safe_dump(tree))
    notices = check_run_directory(load_config(file, ["training.micro_batch_size=4"]))
    assert len(notices) == told and all("images are mixed with others" in n for n in notices)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0.5",
        "training.seed=3",
        "objective.kind=joint",
        "data.seed=3",
    ],
)
def test_a_run_does_not_go_on_with_other_settings(run: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"{key} \(was .*, now '?{value}'?\)"):
        check_run_directory(load_config(run / "config.yaml", [override]))
    shutil.rmtree(run / "checkpoints")
    check_run_directory(load_config(run / "config.yaml", [override]))
