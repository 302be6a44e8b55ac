"""Random numbers of an image's augmentation, from a generator of its own.

Made of `Random.random` alone: of it Python promises the same numbers in every version.
"""

from __future__ import annotations

from random import Random


def between(low: float, high: float, rng: Random) -> float:
    return low + (high - low) * rng.random()


def below(count: int, rng: Random) -> int:
    """0 to count - 1."""
    return int(count * rng.random())


def signed(value: float, rng: Random) -> float:
    """`value` or its negative."""
    return value if rng.random() < 0.5 else -value
