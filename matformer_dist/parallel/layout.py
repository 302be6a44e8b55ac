"""How a weight is cut over tensor-parallel ranks, and put together again.

Legend: T ranks, F neurons (d_ff), m_i widths. A nested FFN is *dealt*: each ring [m_{i-1}, m_i)
is cut into T equal pieces, and a rank stores its pieces ring after ring, so its first m_i / T
rows are its share of granularity i. The order of the whole weight exists only in files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """One weight's cut: the dimension, and the sizes of the blocks that are dealt along it.

    `blocks=None` cuts the dimension as one block, padded with zero rows to a multiple of T (only
    a vocabulary needs the padding; heads and rings are checked to divide). `dim=None` keeps the
    weight whole on every rank.
    """

    dim: int | None = None
    blocks: tuple[int, ...] | None = None

    def local_shape(self, shape: Sequence[int], ranks: int) -> tuple[int, ...]:
        """Shape of the piece that each of `ranks` stores of a weight of `shape`."""
        if self.dim is None:
            return tuple(shape)
        blocks = (shape[self.dim],) if self.blocks is None else self.blocks
        size = sum(-(-block // ranks) for block in blocks)
        return (*shape[: self.dim], size, *shape[self.dim + 1 :])

    def deal(self, full: Tensor, rank: int, ranks: int) -> Tensor:
        """The piece of `full` that `rank` of `ranks` stores, as a tensor of its own."""
        if self.dim is None or ranks == 1:
            return full
        piece = torch.cat(self._places(full, rank, ranks), self.dim)
        return _pad(piece, self.dim, self.local_shape(full.shape, ranks)[self.dim])

    @torch.no_grad()
    def put(self, full: Tensor, piece: Tensor, rank: int, ranks: int) -> None:
        """Copy what `rank` of `ranks` stores to its places in `full`; the inverse of `deal`."""
        if self.dim is None:
            full.copy_(piece)
            return
        start = 0
        for place in self._places(full, rank, ranks):
            size = place.shape[self.dim]
            place.copy_(piece.narrow(self.dim, start, size))
            start += size

    def first(self, size: int) -> Partition:
        """The cut of the first `size` of a dimension; where there are blocks, they end there."""
        if self.blocks is None:
            return self
        ends = list(accumulate(self.blocks))
        return Partition(self.dim, self.blocks[: ends.index(size) + 1])

    def _places(self, full: Tensor, rank: int, ranks: int) -> list[Tensor]:
        """The views of `full` that make up a rank's piece, in its order."""
        assert self.dim is not None
        blocks = [full] if self.blocks is None else full.split(self.blocks, self.dim)
        places = []
        for block in blocks:
            size = -(-block.shape[self.dim] // ranks)
            start = min(rank * size, block.shape[self.dim])
            places.append(block.narrow(self.dim, start, min(size, block.shape[self.dim] - start)))
        return places


REPLICATED = Partition()
ROWS = Partition(dim=0)
COLUMNS = Partition(dim=1)


def _pad(piece: Tensor, dim: int, size: int) -> Tensor:
    missing = size - piece.shape[dim]
    if missing == 0:
        return piece
    shape = list(piece.shape)
    shape[dim] = missing
    return torch.cat([piece, piece.new_zeros(shape)], dim)
