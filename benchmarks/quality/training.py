"""Trains the study's models and keeps what is measured of each, one small file a model."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import write_result
from benchmarks.quality.corpus import corpus, described, prepare, validation_batches
from benchmarks.quality.study import BEST, INACTIVE, ON_GPU, Run, parent, step_flops
from matformer_dist.parallel.topology import cpu_environment

_CALIBRATION_FILES, _CALIBRATION_TOKENS = 8, 32_768
_BEFORE = "evaluation-before.json"  # of an imported run
_MATFORMER = (sys.executable, "-m", "matformer_dist.cli")


class FailedError(Exception):
    """What was said of each that failed; the others were gone on with."""


def train_all(runs: Iterable[Run], jobs: int) -> None:
    """Those that have no result yet, `jobs` at a time; each goes on from its last checkpoint."""
    waiting = [run for run in runs if not run.result.exists()]
    have_weights((parent(run) for run in waiting if run.imported), jobs)
    _each(_train_and_evaluate, waiting, jobs)


def have_weights(runs: Iterable[Run], jobs: int) -> None:
    """Train those that are not there, whether they have a result or not."""
    _each(_train, list(dict.fromkeys(runs)), jobs)


def _each(do: Callable[[Run, int], object], runs: Sequence[Run], jobs: int) -> None:
    """FailedError, at the end, of those that failed."""
    for size in dict.fromkeys(run.size for run in runs):
        prepare(size)

    def attempt(run: Run) -> str | None:
        begun = time.monotonic()
        try:
            do(run, jobs)
        except subprocess.CalledProcessError as error:
            return f"{shlex.join(error.cmd)} ended with {error.returncode}: see {_log(run)}"
        print(f"{run.directory}: {time.monotonic() - begun:.0f} s", flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [told for told in pool.map(attempt, runs) if told]
    if failed:
        raise FailedError("\n".join(failed))


def _train_and_evaluate(run: Run, jobs: int) -> None:
    command = _train(run, jobs)
    config = run.config()
    _evaluate(run, jobs, *(["--heuristic"] if run.name == BEST else []))
    training, moved = config.training, run.directory / INACTIVE
    write_result(
        run.result,
        "cuda" if run.size in ON_GPU else "cpu",
        ("torch",),
        {
            "command": shlex.join(command),
            "run": run.name,
            "size": run.size,
            "seed": run.seed,
            "config": config.model_dump(mode="json"),
            "data": described(config),
        },
        tokens=config.units(training.total_steps * training.global_batch_size),
        training_flops=3 * step_flops(config) * training.total_steps,
        evaluation=json.loads((run.directory / "evaluation.json").read_text()),
        **{
            key: json.loads(path.read_text())
            for key, path in (("inactive", moved), ("before", run.directory / _BEFORE))
            if path.exists()
        },
    )


def _train(run: Run, jobs: int) -> list[str]:
    """To its last step, which a run that is there already says itself; the command."""
    if run.imported and not (run.directory / _BEFORE).exists():
        if not run.directory.exists():
            _import(run, jobs)
        # An import leaves open what is to be trained on, and how.
        (run.directory / "config.yaml").write_text(run.config().to_yaml())
        _evaluate(run, jobs, "--output", str(run.directory / _BEFORE))
    words = [*run.program, "--config", f"benchmarks/quality/configs/{run.size}.yaml"]
    words += run.settings()
    _call([sys.executable, *words], run, jobs)
    return ["python", *words]


def _import(run: Run, jobs: int) -> None:
    """Begin as XL that was trained alone: taken out, and imported as any checkpoint is."""
    of, exported = run.config(), run.directory.with_name(f"{run.directory.name}-parent")
    shutil.rmtree(exported, ignore_errors=True)
    words = ["extract", str(parent(run).directory), "--submodel", "XL", "--format", "hf"]
    _call([*_MATFORMER, *words, "--output", str(exported)], run, jobs)
    assert run.imported
    words = ["import", str(exported), "--output", str(run.directory), "--order", run.imported]
    words += ["--widths", ",".join(map(str, of.granularities.widths))]
    words += ["--names", ",".join(of.granularities.names)]
    if run.imported == "importance":
        files = corpus(of).trained_on()
        for file in files[:: len(files) // _CALIBRATION_FILES]:
            words += ["--calibration", str(file)]
        words += ["--calibration-tokens", str(_CALIBRATION_TOKENS)]
    _call([*_MATFORMER, *words], run, jobs)


def _evaluate(run: Run, jobs: int, *options: str) -> None:
    batches = str(validation_batches(run.config()))
    command = [*_MATFORMER, "evaluate", str(run.directory), "--batches", batches, *options]
    _call(command, run, jobs)


def _call(command: list[str], run: Run, jobs: int) -> None:
    """CalledProcessError where it fails; what it says is in the log."""
    log = _log(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = None if run.size in ON_GPU else cpu_environment(jobs)
    with log.open("ab") as file:
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=True)


def _log(run: Run) -> Path:
    return run.directory.with_name(f"{run.directory.name}.log")
