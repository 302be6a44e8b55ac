"""kill -9 at any moment, during saving too, loses nothing but the steps since the checkpoint."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.run_directory import read_checkpoints
from tests.end_to_end.conftest import write_config
from tests.end_to_end.jobs import Job
from tests.end_to_end.test_resume import lines

STEPS = 60
CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {  # ranks, sections
    "per_sequence": (1, {"objective": {"kind": "per_sequence"}}),
    "joint, bf16, data parallel, in the background": (
        2,
        {
            "objective": {"kind": "joint", "distillation": 0.5},
            "training": {"precision": "bf16", "micro_batch_size": 2},
            "checkpoint": {"async_save": True},
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
    ),
    "sampled, tensor parallel": (
        2,
        {"objective": {"kind": "sampled"}, "parallel": {"tensor": 2}},
    ),
    "sandwich, bf16, ZeRO 3": (
        1,
        {
            "objective": {"kind": "sandwich"},
            "training": {"precision": "bf16"},
            "deepspeed": {"zero_optimization": {"stage": 3}},
        },
    ),
}


def config_of(name: str, path: Path, corpus: Path) -> Path:
    _, sections = CASES[name]
    tree: dict[str, dict[str, Any]] = {
        "training": {"steps": STEPS},
        "logging": {"every": 3, "tensorboard": False},
        "checkpoint": {"every": 2},
        "evaluation": {"every": 16, "batches": 1},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return write_config(path.with_suffix(".yaml"), corpus, path, **_whole(tree))


def _whole(tree: dict[str, dict[str, Any]]) -> dict[str, dict[str, object]]:
    training = {"seq_len": 16, "micro_batch_size": 4, "global_batch_size": 8, "precision": "fp32"}
    return {**tree, "training": {**training, **tree["training"]}}


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_killed_again_and_again_matches_one_that_was_not(
    corpus: Path, tmp_path: Path, name: str, pytestconfig: pytest.Config
) -> None:
    ranks = CASES[name][0]
    whole = Job(config_of(name, tmp_path / "whole", corpus), ranks=ranks)
    assert whole.wait() == [0] * ranks, whole.printed()
    draw = random.Random(name)
    for repeat in range(10 if pytestconfig.getoption("--long") else 1):
        run = tmp_path / f"killed-{repeat}"
        config = config_of(name, run, corpus)
        kills = [_kill(config, ranks, run, draw, in_save=i % 2 == 0) for i in range(5)]
        job = Job(config, ranks=ranks)
        assert job.wait() == [0] * ranks, job.printed()
        assert lines(run) == lines(tmp_path / "whole")
        assert all(was_alive for was_alive, _ in kills), "it was to be killed, not to end by itself"
        assert any(in_save for _, in_save in kills), "no kill fell into a save"


def _kill(
    config: Path, ranks: int, run: Path, draw: random.Random, in_save: bool
) -> tuple[bool, bool]:
    """Kill a run that goes on; whether it was alive, and writing a checkpoint."""
    job = Job(config, ranks=ranks)
    saving = _wait_for_moment(job, run, draw, in_save)
    alive = job.is_alive
    job.kill()
    _no_step_is_lost(run)
    return alive, saving


def _wait_for_moment(job: Job, run: Path, draw: random.Random, in_save: bool) -> bool:
    """Until some time after the first new step, or while a checkpoint is written; whether it is."""
    known = {path.name for path in (run / "checkpoints").glob("step-*")}
    deadline = time.monotonic() + 60
    while job.is_alive and time.monotonic() < deadline:
        new = {path.name for path in (run / "checkpoints").glob("step-*")} - known
        if in_save and any(name.endswith(".incomplete") for name in new):
            time.sleep(draw.uniform(0, 0.02))
            break
        if not in_save and new:
            time.sleep(draw.uniform(0, 0.15))
            break
    return any((run / "checkpoints").glob("*.incomplete"))


def _no_step_is_lost(run: Path) -> None:
    """Whatever was killed, what has a checkpoint's name is one, and metrics reach it.

    The line of the checkpoint's own step may be in the checkpoint still.
    """
    found = read_checkpoints(run)
    assert not found.damaged
    if found.complete:
        written = [json.loads(line)["step"] for line in _whole_lines(run)]
        newest = found.complete[-1]
        reported = newest.step // 3 * 3
        held = newest.manifest.metrics_line
        assert reported == 0 or reported in written or (held and held["step"] == reported)


def _whole_lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
