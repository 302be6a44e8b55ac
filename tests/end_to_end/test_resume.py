"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ROOT, refuse, succeed, train, write_config

CLOCKED = ("tokens_per_second", "model_tflops_per_second", "mfu", "step_ms", "peak_memory_bytes")


def lines(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_run_matches_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, precision: str
) -> None:
    """Every number of every line of metrics, bit for bit; lines straddle the checkpoint."""
    sections: dict[str, dict[str, object]] = {
        "training": {"steps": 8, "precision": precision},
        "logging": {"every": 3},
        "checkpoint": {"every": 4},
        "evaluation": {"every": 6},
    }
    whole = write_config(tmp_path / "a.yaml", corpus, tmp_path / "a", **sections)
    succeed(train(whole))
    killed = write_config(tmp_path / "b.yaml", corpus, tmp_path / "b", **sections)
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", "--config", str(killed)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "b/checkpoints/step-4/manifest.json").exists():
        assert time.monotonic() < deadline and process.poll() in (None, 0)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shown = succeed(train(killed))
    assert "resuming" in shown
    assert lines(tmp_path / "b") == lines(tmp_path / "a")
    refuse(train(killed, "optimizer.lr=0.5"), "optimizer.lr (was 0.003, now 0.5)")
    refuse(train(killed, "checkpoint.resume=never"), "choose another run.dir")
