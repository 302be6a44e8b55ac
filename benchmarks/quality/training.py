"""Trains the study's models and keeps what is measured of each, one small file a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.machine import write_result
from benchmarks.quality.corpus import corpus, prefix, prepare
from benchmarks.quality.study import BEST, INACTIVE, ON_GPU, Run, alone, step_flops
from matformer_dist.demo import SCRIPTS
from matformer_dist.parallel.topology import cpu_environment
from matformer_dist.run_directory import MANIFEST

_CALIBRATION_FILES = 8


def train_all(runs: Iterable[Run], jobs: int) -> None:
    """Those that have no result yet, `jobs` at a time; each goes on from its last checkpoint."""
    waiting = [run for run in runs if not run.result.exists()]
    for size in dict.fromkeys(run.size for run in waiting):
        prepare(size)
    with ThreadPoolExecutor(jobs) as pool:
        for run, seconds in pool.map(lambda run: (run, train(run, jobs)), waiting):
            print(f"{run.directory}: {seconds:.0f} s, {run.result}", flush=True)


def have_weights(runs: Iterable[Run], jobs: int) -> None:
    """Train those that are not there, whether they have a result or not."""
    runs = list(runs)
    for size in dict.fromkeys(run.size for run in runs):
        prepare(size)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: _train(run, jobs), runs))


def train(run: Run, jobs: int) -> float:
    """Train, evaluate, write the result; RuntimeError with what was said where a command fails."""
    begun = time.monotonic()
    command = _train(run, jobs)
    words = ["evaluate", str(run.directory), *(["--heuristic"] if run.name == BEST else [])]
    _call([str(SCRIPTS / "matformer"), *words], run, jobs)
    _write(run, command)
    return time.monotonic() - begun


def _train(run: Run, jobs: int) -> list[str]:
    """To its last step, or nothing where it is there; the command."""
    if run.imported and not run.directory.exists():
        _import(run, jobs)
    configuration = f"benchmarks/quality/configs/{run.size}.yaml"
    words = [*run.program, "--config", configuration, *run.settings()]
    if not _is_trained(run):
        _call([sys.executable, *words], run, jobs)
    return ["python", *words]


def _is_trained(run: Run) -> bool:
    last = f"step-{run.config().training.total_steps}"
    return (run.directory / "checkpoints" / last / MANIFEST).exists()


def _import(run: Run, jobs: int) -> None:
    """Begin as XL that was trained alone: taken out, and imported as any checkpoint is."""
    assert run.imported
    of = run.config()
    parent = alone(run.size, run.seed, of.model.d_ff)
    _train(parent, jobs)
    exported = parent.directory / "hf"
    matformer = str(SCRIPTS / "matformer")
    shutil.rmtree(exported, ignore_errors=True)
    words = ["extract", str(parent.directory), "--submodel", "XL", "--format", "hf"]
    _call([matformer, *words, "--output", str(exported)], run, jobs)
    widths = ",".join(map(str, of.granularities.widths))
    words = ["import", str(exported), "--output", str(run.directory), "--order", run.imported]
    words += ["--widths", widths, "--names", ",".join(of.granularities.names)]
    if run.imported == "importance":
        for file in corpus(of).split()[0][:_CALIBRATION_FILES]:
            words += ["--calibration", str(file)]
    _call([matformer, *words], run, jobs)


def _call(command: list[str], run: Run, jobs: int) -> None:
    log = run.directory.with_name(f"{run.directory.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = None if run.size in ON_GPU else cpu_environment(jobs)
    with log.open("ab") as file:
        code = subprocess.run(
            command, stdout=file, stderr=file, env=environment, check=False
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: see {log}")


def _write(run: Run, command: list[str]) -> None:
    config = run.config()
    training = config.training
    moved = run.directory / INACTIVE
    data = json.loads(prefix(config).with_suffix(".json").read_text())
    write_result(
        run.result,
        "cuda" if run.size in ON_GPU else "cpu",
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
        evaluation=json.loads((run.directory / "evaluation.json").read_text()),
        **({"inactive": json.loads(moved.read_text())} if moved.exists() else {}),
    )
