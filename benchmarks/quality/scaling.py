"""Part 6: loss against N and D, of models trained alone and of granularities, fitted.

N counts parameters without the embedding, D the tokens of the training run that a model is of: a
granularity's is its universal model's, four times what its counterpart saw alone. The paper's form
(its table T3) makes N and D exchangeable; Hoffmann et al.'s (2203.15556, equation 2), beside it,
does not, and tells by its smaller errors where that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from benchmarks.quality import results
from benchmarks.quality.study import BEST, LARGE, MIDDLE, SMALL, TOKENS, non_embedding, read

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """Of one run: a universal model's granularities are points of the same."""

    run: str
    size: str
    parameters: int  # N
    tokens: int  # D
    loss: float  # nats a token


@dataclass(frozen=True)
class Form:
    """A loss by log N and log D; coefficients are fitted by their logarithm, as those span decades
    where exponents change a little.
    """

    text: str
    names: tuple[str, ...]
    of: Callable[..., Array]  # (log N, log D), then the values, coefficients as logarithms
    first: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    def shown(self, values: Array) -> Array:
        """Coefficients as they are, for their logarithms: those whose name is said by `_LOGS`."""
        logs = np.array([name in _LOGS for name in self.names])
        result: Array = np.where(logs, np.exp(np.where(logs, values, 0.0)), values)
        return result

    def at_an_end(self, values: Array) -> list[bool]:
        """Which of them the data do not determine: they go as far as they may."""
        ends = (np.array(self.lowest), np.array(self.highest))
        return [bool(one) for one in np.min([np.abs(values - end) for end in ends], axis=0) < 1e-3]


_LOGS = ("a", "A", "B")


def _exchangeable(at: tuple[Array, Array], log_a: float, b: float, c: float) -> Array:
    result: Array = np.exp(log_a + b * (at[0] + at[1])) + c
    return result


def _apart(
    at: tuple[Array, Array], log_a: float, p: float, log_b: float, q: float, c: float
) -> Array:
    result: Array = np.exp(log_a - p * at[0]) + np.exp(log_b - q * at[1]) + c
    return result


PAPER = Form(
    "a (N D)^b + c", ("a", "b", "c"), _exchangeable,
    (3.0, -0.1, 1.0), (-5.0, -2.0, 0.0), (40.0, -1e-3, 10.0),
)  # fmt: skip
APART = Form(
    "A / N^p + B / D^q + c", ("A", "p", "B", "q", "c"), _apart,
    (3.0, 0.3, 6.0, 0.4, 1.0), (-10.0, 1e-3, -10.0, 1e-3, 0.0), (30.0, 2.0, 40.0, 2.0, 10.0),
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """By least squares in nats, points weighing the same. Intervals are 95%'s, of fits of what the
    form says of the points and luck, which is drawn for each run, the same for all of its points.
    """

    form: Form
    values: Array
    resampled: Array  # [resamples, values]
    luck: float  # standard deviation of that luck, nats
    rms_error: float  # nats, over the points
    largest_error: float

    def loss(self, nd: Array) -> Array:
        """Of the paper's form."""
        return self.form.of((np.log(nd), np.zeros(len(nd))), *self.values)

    def band(self, nd: Array) -> tuple[Array, Array]:
        """Lowest and highest of its 95% interval."""
        at = (np.log(nd), np.zeros(len(nd)))
        low, high = np.quantile(
            [self.form.of(at, *values) for values in self.resampled], (0.025, 0.975), axis=0
        )
        return low, high

    def intervals(self) -> Iterator[tuple[float, float, float]]:
        """Of each value: itself, and the ends of its interval."""
        low, high = np.quantile(
            [self.form.shown(values) for values in self.resampled], (0.025, 0.975), axis=0
        )
        yield from zip(self.form.shown(self.values), low, high, strict=True)


def seeds_apart(size: str) -> float:
    """Standard deviation of the losses of runs that differ in the seed alone, nats."""
    found = [results.luck(size, name) for name in read(size).granularities.names]
    squares = [one.deviation**2 for one in found if one]
    return float(np.sqrt(np.mean(squares))) if squares else 0.0


def points(kind: str) -> list[Point]:
    """kind: alone, or nested. Every size, seed and number of tokens that has results."""
    return [
        point
        for size in (SMALL, MIDDLE, LARGE)
        for suffix in ("", *TOKENS)
        for point in _points(kind, size, suffix)
    ]


def _points(kind: str, size: str, suffix: str) -> Iterator[Point]:
    config = read(size)
    for submodel in config.granularities.uniforms(config.model.n_layers):
        name, n = str(submodel), non_embedding(size, submodel)
        run = (f"alone-{name}" if kind == "alone" else BEST) + suffix
        found = results.by_seed(size, run)
        for seed, loss in results.losses(size, run).items():
            label = f"{size} {run} {seed}"
            yield Point(label, size, n, int(found[seed]["tokens"]), loss[name])


def fit(found: Sequence[Point], form: Form, least_luck: float, resamples: int) -> Fit:
    """A run's luck is estimated by what the fit leaves, and taken to be `least_luck` at least."""
    losses = np.array([point.loss for point in found])
    best = _fit(found, losses, form, form.first)
    expected = form.of(_at(found), *best)
    errors = losses - expected
    runs, run_of = np.unique([point.run for point in found], return_inverse=True)
    luck = max(least_luck, _of_runs(errors, run_of, len(form.names)))
    random = np.random.default_rng(0)
    resampled = [
        _fit(found, expected + luck * random.standard_normal(len(runs))[run_of], form, best)
        for _ in range(resamples)
    ]
    rms, largest = float(np.sqrt((errors**2).mean())), float(np.abs(errors).max())
    return Fit(form, best, np.array(resampled), luck, rms, largest)


def _of_runs(errors: Array, run_of: NDArray[np.intp], fitted: int) -> float:
    """The standard deviation of the runs' mean errors, less the degrees of freedom of the fit."""
    counts = np.bincount(run_of)
    means = np.bincount(run_of, weights=errors) / counts
    return float(np.sqrt((means**2).sum() / max(1, len(means) - fitted)))


def _at(found: Sequence[Point]) -> tuple[Array, Array]:
    n, d = ([float(getattr(p, key)) for p in found] for key in ("parameters", "tokens"))
    return np.log(n), np.log(d)


def _fit(
    found: Sequence[Point], losses: Array, form: Form, first: Sequence[float] | Array
) -> Array:
    limits = (np.array(form.lowest), np.array(form.highest))
    inside = np.clip(first, limits[0] + 1e-6, limits[1] - 1e-6)
    values, _ = curve_fit(form.of, _at(found), losses, p0=inside, bounds=limits, max_nfev=20_000)
    return np.asarray(values)
