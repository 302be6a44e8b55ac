"""The results that are there, their forms, and how sure their numbers are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

import numpy as np
from scipy.stats import t

from benchmarks.machine import RESULTS
from benchmarks.quality.corpus import prefix
from benchmarks.quality.study import BASELINE, MODELS, SEEDS, Run, alone_xl, read
from matformer_dist.config_file import validate_config
from matformer_dist.errors import UserError

Losses = dict[str, float]  # by submodel, nats a token


@dataclass(frozen=True)
class Estimate:
    value: float
    half_width: float | None = None  # of its 95% interval; None: it has none

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of a value of each seed, by Student's t."""
        n = len(values)
        if n < 2:
            return cls(fmean(values))
        return cls(fmean(values), _student(n - 1) * stdev(values) / n**0.5)

    def per(self, whole: float) -> Estimate:
        """In percent of that."""
        factor = 100 / whole
        around = None if self.half_width is None else self.half_width * factor
        return Estimate(self.value * factor, around)

    def text(self, form: str = ".4f") -> str:
        around = "" if self.half_width is None else f" ± {self.half_width:{form.lstrip('+')}}"
        return f"{self.value:{form}}{around}"


def _student(freedom: int) -> float:
    return float(t.ppf(0.975, freedom))


@dataclass(frozen=True)
class Luck:
    """What a run owes to its seed: the standard deviation of losses over seeds, in nats, as one
    number for all models of a size. Few seeds of one model tell little of it, all models together
    enough.
    """

    deviation: float
    freedom: int  # degrees of

    @classmethod
    def of(cls, models: Sequence[Sequence[float]]) -> Luck | None:
        """Pooled from the losses of each model's seeds; None where none has two."""
        several = [losses for losses in models if len(losses) > 1]
        freedom = sum(len(losses) - 1 for losses in several)
        if not freedom:
            return None
        squares = sum((len(losses) - 1) * variance(losses) for losses in several)
        return cls((squares / freedom) ** 0.5, freedom)

    def half_width(self, *seeds: int) -> float:
        """Of the 95% interval of a mean over that many seeds; of two numbers, of the difference
        between two means.
        """
        return _student(self.freedom) * self.deviation * sum(1 / n for n in seeds) ** 0.5


def mean_of(values: Sequence[float], luck: Luck | None) -> Estimate:
    """Of losses of several seeds."""
    return Estimate(fmean(values), luck.half_width(len(values)) if luck else None)


def difference_of(ours: Sequence[float], other: Sequence[float], luck: Luck | None) -> Estimate:
    """Of means: seeds make no pairs, as models of one seed are not like each other by it."""
    around = luck.half_width(len(ours), len(other)) if luck else None
    return Estimate(fmean(ours) - fmean(other), around)


@dataclass(frozen=True)
class Point:
    submodel: str
    parameters: int
    loss: float  # nats a token


@dataclass(frozen=True)
class Chosen:
    """For one budget, of parameters."""

    budget: int
    search: Point
    heuristic: Point


@dataclass(frozen=True)
class Frontier:
    """Mix'n'Match submodels of one universal model beside models that were trained alone.

    Chosen on so many tokens, all judged on so many others.
    """

    chosen_on: int
    judged_on: int
    uniform: list[Point]
    chosen: list[Chosen]
    alone: list[Point]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Frontier:
        """As `dataclasses.asdict` wrote it."""
        points = {key: [Point(**one) for one in found[key]] for key in ("uniform", "alone")}
        chosen = [
            Chosen(one["budget"], Point(**one["search"]), Point(**one["heuristic"]))
            for one in found["chosen"]
        ]
        return cls(found["chosen_on"], found["judged_on"], chosen=chosen, **points)

    def line(self, parameters: int) -> float:
        """The loss of that size between the uniform submodels on both sides of it."""
        sizes, losses = zip(
            *sorted((point.parameters, point.loss) for point in self.uniform), strict=True
        )
        return float(np.interp(parameters, sizes, losses))

    def within(self, parameters: int) -> Chosen:
        """For the budget of that size."""
        return next(one for one in self.chosen if one.budget == parameters)


@cache
def result(size: str, name: str, seed: int) -> dict[str, Any] | None:
    path = _directory(size) / f"{name}-{seed}.json"
    return read_result(path) if path.exists() else None


@cache
def read_result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _directory(size: str) -> Path:
    return RESULTS / "quality" / size


def by_seed(size: str, name: str) -> dict[int, dict[str, Any]]:
    """Of each seed that has one."""
    return {seed: of for seed in SEEDS if (of := result(size, name, seed))}


def losses(size: str, name: str, when: str = "evaluation") -> dict[int, Losses]:
    """Of each seed that has a result; `when`: or `before`, of an imported model."""
    return {
        seed: {one["submodel"]: one["loss"] for one in of[when]["submodels"]}
        for seed, of in by_seed(size, name).items()
    }


def alone(size: str, names: Sequence[str], suffix: str = "") -> dict[int, Losses]:
    """Of models that were trained alone, as those of one universal model."""
    found: dict[int, Losses] = {}
    for name in names:
        for seed, of in losses(size, f"alone-{name}{suffix}").items():
            found.setdefault(seed, {})[name] = of[name]
    return found


def models(size: str) -> list[str]:
    """That are trained, and have results."""
    found = map(read_result, sorted(_directory(size).glob("*.json")))
    return list(dict.fromkeys(of["run"] for of in found if "evaluation" in of))


def luck(size: str, submodel: str) -> Luck | None:
    return Luck.of([_values(losses(size, name), submodel) for name in models(size)])


def mean(size: str, of: dict[int, Losses], submodel: str) -> Estimate | None:
    values = _values(of, submodel)
    return mean_of(values, luck(size, submodel)) if values else None


def difference(
    size: str, ours: dict[int, Losses], other: dict[int, Losses], submodel: str
) -> Estimate | None:
    """Ours less the other's, each over the seeds that it has: below zero is better."""
    a, b = _values(ours, submodel), _values(other, submodel)
    return difference_of(a, b, luck(size, submodel)) if a and b else None


def _values(of: dict[int, Losses], submodel: str) -> list[float]:
    return [one[submodel] for one in of.values() if submodel in one]


def check() -> None:
    """SystemExit where results do not belong together: of other text (another Python's library, or
    packages), or of a model that the study has not, or has with other settings.
    """
    runs = {run.result: run for part in MODELS.values() for run in part()}
    first: dict[tuple[Path, str], tuple[Path, object]] = {}
    for path in sorted((RESULTS / "quality").glob("*/*.json")):
        try:
            found = read_result(path)
            corpus, data = prefix(read(found["size"])), found["data"]
            described = [("data", data)]
            if "evaluation" in found:
                described.append(("validation", found["evaluation"]["data_sha256"]))
        except (ValueError, KeyError) as error:
            sys.exit(f"{path} is no result of the study ({error!r}); move it away")
        for what, said in described:
            other, expected = first.setdefault((corpus, what), (path, said))
            if said != expected:
                sys.exit(
                    f"{path} was measured on {what} {said}, {other} on {expected}: these cannot be "
                    "compared; move away the results of either, and run the study again"
                )
        if "measured" not in found:
            _check_model(path, found, runs.get(path))


def _check_model(path: Path, found: dict[str, Any], run: Run | None) -> None:
    if found["run"] == BASELINE:
        run = alone_xl(found["seed"])
    if run is None:
        sys.exit(f"{path}: the study has no such model; move it away")
    try:
        is_ours = validate_config(found["config"], str(path)) == run.config()
    except UserError:  # settings that there were once
        is_ours = False
    if not is_ours:
        sys.exit(f"{path} is of other settings than the study's; move it away, and train it anew")
