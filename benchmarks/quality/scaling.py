"""Part 6: loss against N and D, of models trained alone and of granularities, fitted.

The paper's form (table T3): loss = a (N D)^b + c. N counts parameters without the embedding, D the
tokens that a model of that size is trained on alone; a granularity of a universal model stands at
the same D, since it has the same share of the FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from benchmarks.quality import results
from benchmarks.quality.study import BEST, LARGE, MIDDLE, SMALL, TOKENS, read, tokens_alone
from matformer_dist.counting import count_parameters

_RESAMPLES = 500
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    size: str
    submodel: str
    parameters: int  # N
    tokens: int  # D
    losses: tuple[float, ...]  # of the seeds


@dataclass(frozen=True)
class Fit:
    """a, b, c and the 95% interval of each, by resampling the points with their seeds."""

    values: tuple[float, float, float]
    intervals: tuple[tuple[float, float], ...]
    largest_error: float  # nats, over the points

    def loss(self, nd: Array) -> Array:
        return _form(np.log(nd), *_inner(self.values))


def points(kind: str) -> list[Point]:
    """kind: alone, or nested. Every size, and other tokens at the smallest."""
    places = [(size, "") for size in (SMALL, MIDDLE, LARGE)]
    places += [(SMALL, suffix) for suffix in TOKENS]
    return [point for size, suffix in places for point in _points(kind, size, suffix)]


def _points(kind: str, size: str, suffix: str) -> Iterator[Point]:
    config = read(size)
    outputs = config.model.vocab_size
    assert outputs is not None
    tokens = round(TOKENS.get(suffix, 1) * tokens_alone(size))
    nesting = config.granularities
    if kind == "alone":
        found = results.alone(size, nesting.names, suffix)
    else:
        found = results.losses(size, BEST + suffix)
    for submodel in nesting.uniforms(config.model.n_layers):
        name = str(submodel)
        losses = tuple(of[name] for of in found.values() if name in of)
        if losses:
            n = count_parameters(config.model, outputs, submodel).non_embedding
            yield Point(size, name, n, tokens, losses)


def fit(found: Sequence[Point]) -> Fit:
    """By least squares in nats, points weighing the same."""
    best = _fit(found, [float(np.mean(point.losses)) for point in found])
    random = np.random.default_rng(0)
    resampled = []
    for _ in range(_RESAMPLES):
        chosen = [found[i] for i in sorted(random.integers(len(found), size=len(found)))]
        if len({point.parameters * point.tokens for point in chosen}) < 4:
            continue
        losses = [float(random.choice(point.losses)) for point in chosen]
        resampled.append(_fit(chosen, losses, best.tolist()))
    low, high = np.quantile(np.array(resampled), (0.025, 0.975), axis=0)
    values = (float(best[0]), float(best[1]), float(best[2]))
    fitted = Fit(values, tuple(zip(map(float, low), map(float, high), strict=True)), 0.0)
    nd = np.array([point.parameters * point.tokens for point in found], dtype=float)
    wanted = np.array([np.mean(point.losses) for point in found])
    return Fit(values, fitted.intervals, float(np.abs(fitted.loss(nd) - wanted).max()))


def _form(log_nd: Array, log_a: float, b: float, c: float) -> Array:
    """In the logarithm of a: a itself spans decades as b changes."""
    result: Array = np.exp(log_a + b * log_nd) + c
    return result


def _inner(values: Sequence[float]) -> tuple[float, float, float]:
    return float(np.log(values[0])), values[1], values[2]


def _fit(found: Sequence[Point], losses: Sequence[float], start: Sequence[float] = ()) -> Array:
    log_nd = np.log([float(point.parameters * point.tokens) for point in found])
    first = _inner(start) if len(start) else (3.0, -0.1, 1.0)
    limits = ([-5.0, -2.0, 0.0], [40.0, -1e-3, min(losses)])
    first = (first[0], first[1], min(first[2], min(losses) * 0.99))
    (log_a, b, c), _ = curve_fit(_form, log_nd, losses, p0=first, bounds=limits, maxfev=20_000)
    return np.array([np.exp(log_a), b, c])
