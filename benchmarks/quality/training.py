"""Trains the study's models and keeps what is measured of each, one small file a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.machine import write_result
from benchmarks.quality.corpus import DATA
from benchmarks.quality.study import Run, step_flops
from matformer_dist.demo import SCRIPTS
from matformer_dist.parallel.topology import cpu_environment


def train_all(runs: Iterable[Run], jobs: int) -> None:
    """Those that have no result yet, `jobs` at a time; each goes on from its last checkpoint."""
    waiting = [run for run in runs if not run.result.exists()]
    with ThreadPoolExecutor(jobs) as pool:
        for run, seconds in pool.map(lambda run: (run, train(run, jobs)), waiting):
            print(f"{run.directory}: {seconds:.0f} s, {run.result}", flush=True)


def train(run: Run, jobs: int) -> float:
    """Train, evaluate, write the result; RuntimeError with what was said where a command fails."""
    begun = time.monotonic()
    configuration = f"benchmarks/quality/configs/{run.size}.yaml"
    command = ["python", "launch/train.py", "--config", configuration, *run.settings()]
    _call([sys.executable, *command[1:]], run, jobs)
    _call([str(SCRIPTS / "matformer"), "evaluate", str(run.directory), "--heuristic"], run, jobs)
    seconds = time.monotonic() - begun
    _write(run, command, seconds)
    return seconds


def _call(command: list[str], run: Run, jobs: int) -> None:
    run.directory.mkdir(parents=True, exist_ok=True)
    log = run.directory / "log.txt"
    with log.open("ab") as file:
        code = subprocess.run(
            command, stdout=file, stderr=file, env=cpu_environment(jobs), check=False
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: see {log}")


def _write(run: Run, command: list[str], seconds: float) -> None:
    config = run.config()
    training = config.training
    data = json.loads((DATA / "train.json").read_text())
    write_result(
        run.result,
        "cpu",
        ("torch",),
        {
            "command": " ".join(command),
            "run": run.name,
            "size": run.size,
            "seed": run.seed,
            "data": {key: data[key] for key in ("tokens", "documents", "tokenizer_sha256")},
        },
        tokens=config.units(training.total_steps * training.global_batch_size),
        training_flops=3 * step_flops(config) * training.total_steps,
        seconds=round(seconds),
        evaluation=json.loads((run.directory / "evaluation.json").read_text()),
    )
