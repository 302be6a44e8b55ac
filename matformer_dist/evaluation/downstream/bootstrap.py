"""Standard errors of metrics that are no means, without lm-eval's processes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api import metrics

RESAMPLES = 1000


@contextmanager
def in_this_process() -> Iterator[None]:
    """lm-eval forks a process for each core, which may hang where threads run, as torch's do."""
    theirs = metrics.bootstrap_stderr
    metrics.bootstrap_stderr = standard_error
    try:
        yield
    finally:
        metrics.bootstrap_stderr = theirs


def standard_error(
    metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int
) -> float:
    """Standard deviation of the metric over `iters` resamples; the same values give the same."""
    rng = random.Random(0)
    return statistics.stdev(metric(rng.choices(values, k=len(values))) for _ in range(iters))
