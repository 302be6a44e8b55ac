"""A user's mistake costs one message and exit code 2, in one process and on several ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.conftest import (
    ROOT,
    launch,
    matformer,
    refuse,
    run,
    succeed,
    train,
    write_config,
)


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml", corpus, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.stepz=3", "did you mean training.steps"),
        ("parallel.tensor=3", "model.n_heads 4 does not divide over parallel.tensor 3"),
        ("data.tokenizer=absent.model", "absent.model"),
        ("model.vocab_size=601", "model.vocab_size is 601"),
        ("deepspeed.zero_optimization.stage=5", "zero_optimization.stage is 5"),
        ("deepspeed.zero_optimisation.stage=1", "did you mean zero_optimization"),
        ("deepspeed.zero_optimization.stages=1", "unknown key deepspeed.zero_optimization.stages"),
        ("logging.wandb=true", "wandb is not installed"),
        ("deepspeed.train_batch_size=3", "training.global_batch_size"),
        ("training.seq_len=100", "model.max_seq_len"),
        ("checkpoint.resume=/absent", "/absent"),
        ("deepspeed.wandb.enabled=true", "set that instead"),
        ("deepspeed.tensorboard=3", "DeepSpeed does not take"),
        ("deepspeed.checkpoint.use_node_local_storage=true", "the section checkpoint"),
        ("deepspeed.zero_optimization=3", "must hold keys"),
        ("evaluation.batches=100000", "ask for at most"),
    ],
)
def test_bad_settings(config: Path, override: str, says: str) -> None:
    refuse(train(config, override), says)


def test_bf16_without_fp32_accumulation(config: Path) -> None:
    stage = "deepspeed.zero_optimization.stage=0"
    refuse(train(config, stage, "training.precision=bf16"), "no fp32 accumulation")


def test_undealable_rings(config: Path) -> None:
    refuse(train(config, "nesting.widths=[7,64]", "parallel.tensor=2"), "do not divide by 2")


def test_bad_data(corpus: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{suffix}", f"{broken}{suffix}")
    shutil.copy(f"{corpus}.model", f"{broken}.model")
    config = write_config(tmp_path / "c.yaml", broken, tmp_path / "run")
    whole = Path(f"{broken}.bin").read_bytes()
    Path(f"{broken}.bin").write_bytes(whole[:-10])
    refuse(train(config), "broken.bin")
    Path(f"{broken}.bin").write_bytes(whole)
    Path(f"{broken}.idx").unlink()
    refuse(train(config), "broken.idx")


def test_bad_layout_of_ranks(config: Path) -> None:
    refuse(train(config, "parallel.tensor=4", ranks=2), "2 ranks were started")
    refuse(train(config, "training.global_batch_size=4", ranks=2), "does not divide by 8")


def test_what_the_main_rank_finds_stops_every_rank(config: Path, tmp_path: Path) -> None:
    """After the ranks have joined: in the run directory, checkpoints, data, permissions."""
    succeed(train(config, "training.steps=2", ranks=2))
    refuse(train(config, "optimizer.lr=0.5", ranks=2), "optimizer.lr (was 0.003, now 0.5)")
    (tmp_path / "run/checkpoints/step-2/manifest.json").unlink()
    refuse(train(config, ranks=2), "no checkpoint in")
    fresh = f"run.dir={tmp_path / 'other'}"
    refuse(train(config, fresh, f"data.train=[[1,{tmp_path}/none]]", ranks=2), "none.idx")
    (tmp_path / "file").write_text("")
    below = f"run.dir={tmp_path / 'file' / 'run'}"
    refuse(train(config, below, ranks=2), f"{tmp_path / 'file'}")


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refuse(matformer("prepare-data", tmp_path / "empty.txt", "--output", tmp_path / "d"), "empty")


def test_bad_commands(tmp_path: Path) -> None:
    refuse(matformer("extract", tmp_path, "--submodel", "S", "--output", tmp_path / "o"),
           "no complete checkpoint")  # fmt: skip
    refuse(matformer("generate", tmp_path), str(tmp_path))
    refuse(matformer("report", tmp_path), "config.yaml")
    refuse(matformer("evaluate", tmp_path / "absent"), "absent")
    refuse(matformer("evaluate", tmp_path, "--part", "3/2"), "'3/2' must be I/N")
    refuse(matformer("prepare-data", ROOT / "launch", "--output", tmp_path), "is a folder")
    usage = matformer("generate", tmp_path, "--seed", 2**70)
    assert usage.returncode == 2 and "Traceback" not in usage.stderr


def test_tasks_of_srun_that_cannot_be(config: Path) -> None:
    slurm = ("SLURM_PROCID=2", "SLURM_STEP_NUM_TASKS=2", "SLURM_LOCALID=0")
    refuse(run("env", *slurm, *launch(config)), "SLURM_PROCID is 2, SLURM_STEP_NUM_TASKS is 2")
