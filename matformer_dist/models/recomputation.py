"""What autograd need not keep, because it is cheap to make again in the backward pass.

"Selective" activation checkpointing: norms and rotated queries and keys are made again, products
are kept, so the backward pass repeats no GEMM. The consumers (linear maps, the nested FFN,
attention) stay as they are; only what they hand to autograd for keeping is exchanged for the way to
make it. A compiler of whole layers decides for itself what it keeps (and does keep these), so with
torch.compile norms and rotations alone are compiled (`Block.compile_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Again(NamedTuple):
    """A value, and what makes its like."""

    value: Tensor
    make: Callable[[], Tensor]


class _Kept(NamedTuple):
    """Instead of a tensor that shares the memory of a value."""

    make: Callable[[], Tensor]
    bytes: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def made_again(*values: Again) -> Iterator[None]:
    """Inside, autograd keeps no value and no view of one, and makes it when it is wanted.

    What `make` needs is for itself to hold, without a graph.
    """
    makes = {_address(value): make for value, make in values if value.numel()}

    def keep(tensor: Tensor) -> Tensor | _Kept:
        make = makes.get(_address(tensor))
        if make is None:
            # A leaf itself: ZeRO-3 takes its weights away meanwhile. Nothing that has a graph: a
            # node that keeps its own result would never be freed.
            return tensor if tensor.is_leaf else tensor.detach()
        bytes_, offset = tensor.untyped_storage().nbytes(), int(tensor.storage_offset())
        return _Kept(make, bytes_, tensor.size(), tensor.stride(), offset)

    def give(kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            made = kept.make()
        assert made.untyped_storage().nbytes() == kept.bytes, "make lays it out as it was"
        return made.as_strided(kept.size, kept.stride, kept.offset)

    with saved_tensors_hooks(keep, give):
        yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
