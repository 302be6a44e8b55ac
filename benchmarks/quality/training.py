"""Trains the study's models and keeps what is measured of each, one small file a model."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence

from benchmarks.machine import write_result
from benchmarks.quality.corpus import calibration, described, prepare, validation_batches
from benchmarks.quality.processes import FailedError, call, each
from benchmarks.quality.study import BEST, INACTIVE, LONG, ON_GPU, Run, parent, step_flops
from matformer_dist.config_file import load_config

_CALIBRATION_TOKENS = 32_768
# Of an imported run: what it was imported by, and its evaluation before it was trained on.
_IMPORTED, _BEFORE = "imported.txt", "evaluation-before.json"
_HEURISTIC = (BEST, BEST + LONG)  # whose Mix'n'Match submodels are evaluated, too


def train_all(runs: Iterable[Run], jobs: int) -> None:
    """Those that have no result yet, `jobs` at a time; each goes on from its last checkpoint."""
    waiting = [run for run in runs if not run.result.exists()]
    have_weights((parent(run) for run in waiting if run.imported), jobs)
    _prepare(waiting)
    each(lambda run: _train_and_evaluate(run, jobs), waiting, jobs)


def have_weights(runs: Iterable[Run], jobs: int) -> None:
    """Train those that are not there, whether they have a result or not."""
    wanted = list(dict.fromkeys(runs))
    _prepare(wanted)
    each(lambda run: _train(run, jobs), wanted, jobs)


def _prepare(runs: Sequence[Run]) -> None:
    for size in dict.fromkeys(run.size for run in runs):
        prepare(size)


def _train_and_evaluate(run: Run, jobs: int) -> None:
    commands = _train(run, jobs)
    config = run.config()
    _evaluate(run, jobs, *(["--heuristic"] if run.name in _HEURISTIC else []))
    training = config.training
    more = {"inactive": INACTIVE} if run.watches else {}
    more |= {"before": _BEFORE} if run.imported else {}
    write_result(
        run.result,
        "cuda" if run.size in ON_GPU else "cpu",
        ("torch",),
        {
            "command": " && ".join(commands),
            "run": run.name,
            "size": run.size,
            "seed": run.seed,
            "config": config.model_dump(mode="json"),
            "data": described(config),
        },
        tokens=config.units(training.total_steps * training.global_batch_size),
        training_flops=3 * step_flops(config) * training.total_steps,
        evaluation=json.loads((run.directory / "evaluation.json").read_text()),
        **{key: json.loads((run.directory / name).read_text()) for key, name in more.items()},
    )


def _train(run: Run, jobs: int) -> list[str]:
    """To its last step, which a run that is there already says itself; the commands."""
    if run.watches and not (run.directory / INACTIVE).exists():
        shutil.rmtree(run.directory, ignore_errors=True)  # it wants to see all steps
    commands = _import(run, jobs) if run.imported else []
    _check_configuration(run)
    words = [*run.program, "--config", f"benchmarks/quality/configs/{run.size}.yaml"]
    words += run.settings()
    _call([sys.executable, *words], run, jobs)
    return [*commands, shlex.join(["python", *words])]


def _check_configuration(run: Run) -> None:
    """A run of other settings would be gone on with, and be taken for this one."""
    path = run.directory / "config.yaml"
    if path.exists() and load_config(path) != run.config():
        raise FailedError(
            f"{run.directory} was begun with another configuration than the study's; move it away"
        )


def _import(run: Run, jobs: int) -> list[str]:
    """Begin as XL that was trained alone: taken out, and imported as any checkpoint is."""
    of, exported = run.config(), run.directory.with_name(f"{run.directory.name}-parent")
    extract = ["extract", str(parent(run).directory), "--submodel", "XL", "--format", "hf"]
    extract += ["--output", str(exported)]
    take = ["import", str(exported), "--output", str(run.directory), "--order", str(run.imported)]
    take += ["--widths", ",".join(map(str, of.granularities.widths))]
    take += ["--names", ",".join(of.granularities.names)]
    if run.imported == "importance":
        take += ["--calibration", str(calibration(of))]
        take += ["--calibration-tokens", str(_CALIBRATION_TOKENS)]
    commands = [shlex.join(["matformer", *words]) for words in (extract, take)]
    imported, before = run.directory / _IMPORTED, run.directory / _BEFORE
    text = "\n".join(commands)
    if before.exists() and imported.read_text() != text:
        raise FailedError(f"{run.directory} was not imported by {commands[-1]}; move it away")
    if not before.exists():  # or it was cut off on its way
        for directory in (exported, run.directory):
            shutil.rmtree(directory, ignore_errors=True)
        for words in (extract, take):
            _matformer(words, run, jobs)
        # An import leaves open what is to be trained on, and how.
        (run.directory / "config.yaml").write_text(of.to_yaml())
        imported.write_text(text)
        _evaluate(run, jobs, "--output", str(before))
    return commands


def _evaluate(run: Run, jobs: int, *options: str) -> None:
    batches = str(validation_batches(run.config()))
    _matformer(["evaluate", str(run.directory), "--batches", batches, *options], run, jobs)


def _matformer(words: Sequence[str], run: Run, jobs: int) -> None:
    _call([sys.executable, "-m", "matformer_dist.cli", *words], run, jobs)


def _call(command: Sequence[str], run: Run, jobs: int) -> None:
    log = run.directory.with_name(f"{run.directory.name}.log")
    call(command, log, jobs, on_gpu=run.size in ON_GPU)
