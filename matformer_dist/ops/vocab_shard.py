"""The rows of the head that one tensor-parallel rank holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

_shards: WeakValueDictionary[int, VocabShard] = WeakValueDictionary()
_keys = itertools.count()
WHOLE = -1
"""Instead of a key: all rows of the weight, on one rank."""


@dataclass(frozen=True, eq=False)
class VocabShard:
    """This rank's rows of the head.

    offset   global id of the first row; grows with the rank
    size     rows that are real vocabulary; what `weight` holds beyond is padding: no part in the
             softmax, zero gradient
    gather   starts [m, k] -> [T, m, k] over the tensor-parallel ranks, and returns what waits for
             the result; None on one rank
    """

    offset: int
    size: int
    gather: Callable[[Tensor], Callable[[], Tensor]] | None = None
    # An operator takes no function, so it is told where to find it.
    key: int = field(default_factory=_keys.__next__, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.offset < 0 or self.size < 0:
            raise ValueError(f"{self} must not hold negative numbers")
        _shards[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return VocabShard, (self.offset, self.size, self.gather)  # under a key of its own

    def __deepcopy__(self, _: Any) -> VocabShard:
        return self  # it does not change, and a process group cannot be copied


def find(key: int, weight_rows: int) -> VocabShard:
    """The shard of this key, for a weight of so many rows."""
    return VocabShard(0, weight_rows) if key == WHOLE else _shards[key]
