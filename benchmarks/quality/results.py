"""The results that are there, and what several seeds say together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from benchmarks.machine import RESULTS
from benchmarks.quality.study import SEEDS

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

    def text(self, form: str = ".4f") -> str:
        around = "" if self.half_width is None else f" ± {self.half_width:{form.lstrip('+')}}"
        return f"{self.value:{form}}{around}"


@cache
def result(size: str, name: str, seed: int) -> dict[str, Any] | None:
    path = RESULTS / "quality" / size / f"{name}-{seed}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def losses(size: str, name: str) -> dict[int, Losses]:
    """Of each seed that has a result."""
    found = {seed: result(size, name, seed) for seed in SEEDS}
    return {
        seed: {one["submodel"]: one["loss"] for one in of["evaluation"]["submodels"]}
        for seed, of in found.items()
        if of
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


def difference(ours: dict[int, Losses], other: dict[int, Losses], submodel: str) -> Mean | None:
    """Ours less the other's, paired by seed: below zero is better."""
    values = [
        of[submodel] - other[seed][submodel]
        for seed, of in ours.items()
        if submodel in of and submodel in other.get(seed, {})
    ]
    return Mean.of(values) if values else None
