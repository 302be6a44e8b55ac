"""Which image is sample i of a run: pure functions of the seed, the epoch and the data."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_GROUPS_TOGETHER = 8  # row groups whose rows are mixed
_EPOCHS_KEPT = 2  # a batch may lie in two


def permutation(size: int, *key: object) -> Indices:
    """[size]: each of 0 to size - 1 once, in an order that `key` decides."""
    seed = hashlib.sha256(":".join(map(str, key)).encode()).digest()[:4]  # what randperm takes in
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    order: Indices = torch.randperm(size, generator=generator).numpy()
    return order


def held_out(size: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """The samples for training and those for validation, each in the order of the data."""
    order = permutation(size, "split", seed)
    count = round(share * size)
    return np.sort(order[count:]), np.sort(order[:count])


def spread(size: int, count: int | None) -> Indices:
    """`count` of 0 to size - 1, ascending and evenly spread; all where there are no more, or None
    are asked for.

    Data often lie class by class, so the first ones alone would be of few classes.
    """
    count = size if count is None else min(size, count)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)


class Order:
    """Position i % size of epoch i // size; every epoch has a permutation of its own.

    groups: None, or ascending positions [groups] at which groups begin, the first at 0. Then
    groups stand in random order, and positions are mixed within eight neighbouring ones: a process
    that keeps so many in memory reads each of them only once.
    """

    def __init__(self, size: int, seed: int, groups: Indices | None = None) -> None:
        self.size, self.seed, self.groups = size, seed, groups
        self._epochs: OrderedDict[int, Indices] = OrderedDict()

    def __call__(self, sample: int) -> int:
        epoch, position = divmod(sample, self.size)
        if epoch not in self._epochs:
            self._epochs[epoch] = self._epoch(epoch)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return int(self._epochs[epoch][position])

    def _epoch(self, epoch: int) -> Indices:
        mixed = permutation(self.size, "epoch", self.seed, epoch)
        if self.groups is None:
            return mixed
        stops = np.append(self.groups[1:], self.size)
        order = permutation(len(self.groups), "groups", self.seed, epoch)
        runs = [np.arange(self.groups[group], stops[group]) for group in order]
        parts = []
        for first in range(0, len(runs), _GROUPS_TOGETHER):
            part = np.concatenate(runs[first : first + _GROUPS_TOGETHER])
            parts.append(part[permutation(len(part), "rows", self.seed, epoch, first)])
        return np.concatenate(parts)
