"""A run that is called again goes on, or says why it does not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import matformer, refuse, succeed, train, write_config
from tests.end_to_end.jobs import Job

CLOCKED = (
    "tokens_per_second", "tokens_per_second_per_device", "images_per_second",
    "images_per_second_per_device", "model_tflops_per_second", "mfu", "step_ms", "time_ms",
    "slowest_rank", "memory", "peak_memory_bytes", "checkpoint_ms",
)  # fmt: skip


def processes_of(config: Path) -> list[int]:
    """Launcher and ranks of a run, by their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if bytes(config) in words:
            found.append(int(path.parent.name))
    return found


def lines(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in found]


def test_a_finished_run_goes_on_with_more_steps(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, tmp_path / "run")
    assert "finished:" not in succeed(train(config))
    assert "finished: all 6 steps are done" in succeed(train(config))
    succeed(train(config, "training.steps=8", "training.compile=true"))
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))
    refuse(train(config, "optimizer.lr=0.5"), "optimizer.lr (was 0.003, now 0.5)")
    refuse(train(config, "checkpoint.resume=never"), "choose another run.dir")
    refuse(train(config, f"checkpoint.resume={tmp_path / 'run'}@6"), "holds later steps (8)")


def test_a_run_goes_on_under_another_layout(corpus: Path, tmp_path: Path) -> None:
    """The command is the same but for the ranks; lines of metrics go on to rounding."""
    whole = write_config(tmp_path / "a.yaml", corpus, tmp_path / "a")
    succeed(train(whole, "training.steps=6"))
    moved = write_config(tmp_path / "b.yaml", corpus, tmp_path / "b")
    assert Job(moved, "training.steps=6", "checkpoint.every=4").wait() == [0]
    shutil.rmtree(tmp_path / "b/checkpoints/step-6")
    zero = "deepspeed.zero_optimization.stage=3"
    job = Job(moved, "training.steps=6", "parallel.tensor=2", zero, ranks=2)
    assert job.wait() == [0, 0], job.printed()
    assert "from TP 1 x DP 1, ZeRO 1: done" in job.printed()
    (said,) = re.findall(r"continuity .* ([\d.]+), was ([\d.]+)", job.printed())
    assert float(said[0]) == pytest.approx(float(said[1]), rel=1e-5)
    for one, other in zip(lines(tmp_path / "b"), lines(tmp_path / "a"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    printed = succeed(matformer("verify", tmp_path / "b"))
    assert "step-4       good: 2 files" in printed
    assert "step-6       good: 4 files" in printed
    file = next((tmp_path / "b/checkpoints/step-6").glob("*optim*"))
    with file.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"x")
    done = matformer("verify", f"{tmp_path / 'b'}@6")
    assert done.returncode == 1 and f"damaged: {file.name}" in done.stdout
    # The damaged one is named, and the one before it taken.
    job = Job(moved, "training.steps=6")
    assert job.wait() == [0], job.printed()
    assert f"{file.name} is not as it was written" in job.printed()
    assert "from" not in job.printed().split("resuming")[1].split("\n")[1]
    assert lines(tmp_path / "b") == lines(tmp_path / "a")
