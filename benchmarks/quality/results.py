"""The results that are there, their forms, and what several seeds say together."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t

from benchmarks.machine import RESULTS
from benchmarks.quality.corpus import prefix
from benchmarks.quality.study import SEEDS, read

Losses = dict[str, float]  # by submodel, nats a token


@dataclass(frozen=True)
class Mean:
    """Of a value of each seed."""

    value: float
    half_width: float | None  # of its 95% interval by Student's t; None of one seed
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        if n < 2:
            return cls(fmean(values), None, n)
        return cls(fmean(values), float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5, n)

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; of one seed, the value."""
        around = self.half_width or 0.0
        return self.value - around, self.value + around

    def text(self, form: str = ".4f") -> str:
        around = "" if self.half_width is None else f" ± {self.half_width:{form.lstrip('+')}}"
        return f"{self.value:{form}}{around}"


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
    path = RESULTS / "quality" / size / f"{name}-{seed}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


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


def mean(of: dict[int, Losses], submodel: str) -> Mean | None:
    values = [one[submodel] for one in of.values() if submodel in one]
    return Mean.of(values) if values else None


def difference(
    ours: dict[int, Losses], other: dict[int, Losses], submodel: str, *, in_percent: bool = False
) -> Mean | None:
    """Ours less the other's, paired by seed: below zero is better. In nats, or percent of it."""
    pairs = [
        (of[submodel], other[seed][submodel])
        for seed, of in ours.items()
        if submodel in of and submodel in other.get(seed, {})
    ]
    values = [(a - b) * (100 / b if in_percent else 1) for a, b in pairs]
    return Mean.of(values) if values else None


def check_data() -> None:
    """SystemExit where results are of different text: another Python's library, or packages."""
    first: dict[str, tuple[Path, object]] = {}
    for path in sorted((RESULTS / "quality").glob("*/*.json")):
        found = json.loads(path.read_text())
        corpus = str(prefix(read(found["size"])))
        other, data = first.setdefault(corpus, (path, found["data"]))
        if data != found["data"]:
            sys.exit(
                f"{path} was measured on {found['data']}, {other} on {data}: these cannot be "
                "compared; move away the results of either, and run the study again"
            )
