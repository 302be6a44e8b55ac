"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ROOT, launch, refuse, succeed, train, write_config

CLOCKED = ("tokens_per_second", "model_tflops_per_second", "mfu", "step_ms", "peak_memory_bytes")


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


@pytest.mark.parametrize(
    ("precision", "ranks", "tensor", "stage"),
    [("fp32", None, 1, 1), ("bf16", None, 1, 1), ("fp32", 2, 2, 1), ("bf16", 2, 1, 2)],
)
def test_killed_run_matches_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, precision: str, ranks: int | None, tensor: int, stage: int
) -> None:
    """Every number of every line of metrics, bit for bit; lines straddle the checkpoint."""
    sections: dict[str, dict[str, object]] = {
        "training": {"steps": 8, "precision": precision},
        "logging": {"every": 3},
        "checkpoint": {"every": 4},
        "evaluation": {"every": 6},
        "parallel": {"tensor": tensor},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    whole = write_config(tmp_path / "a.yaml", corpus, tmp_path / "a", **sections)
    succeed(train(whole, ranks=ranks))
    killed = write_config(tmp_path / "b.yaml", corpus, tmp_path / "b", **sections)
    process = subprocess.Popen(
        launch(killed, ranks=ranks),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "b/checkpoints/step-4/manifest.json").exists():
        assert time.monotonic() < deadline and process.poll() in (None, 0)
        time.sleep(0.01)
    for rank in processes_of(killed):
        with contextlib.suppress(ProcessLookupError):  # the launcher's end can be a rank's
            os.kill(rank, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b/checkpoints/step-8").exists(), "it was to be killed before its end"
    shown = succeed(train(killed, ranks=ranks))
    assert "resuming" in shown
    assert lines(tmp_path / "b") == lines(tmp_path / "a")
    if ranks is None:
        refuse(train(killed, "optimizer.lr=0.5"), "optimizer.lr (was 0.003, now 0.5)")
        refuse(train(killed, "checkpoint.resume=never"), "choose another run.dir")


def test_a_finished_run_goes_on_with_more_steps(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", corpus, tmp_path / "run")
    assert "finished:" not in succeed(train(config))
    assert "finished: all 6 steps are done" in succeed(train(config))
    succeed(train(config, "training.steps=8", "training.compile=true"))
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))
    refuse(train(config, f"checkpoint.resume={tmp_path / 'run'}@6"), "holds later steps (8)")
