"""Tells when this process begins to issue or to await a collective, and when it is through.

Megatron-Core, DeepSpeed and this package call torch.distributed's functions under many names, some
of which they took when they were imported. All of them end in a method of ProcessGroup, and what
waits for its result in Work.wait (or, on a GPU, in a stream that waits for another one's event): it
is there that `around_collectives` listens, and at RowExchange, whose collectives go past both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from matformer_dist.parallel.sequence import RowExchange

_OF_ROWS = ("start_gather", "start_sum", "total", "wait")
_COLLECTIVES = (
    "_allgather_base", "_end_coalescing", "_reduce_scatter_base", "all_gather_single",
    "all_gather_single_coalesced", "all_to_all_single", "allgather", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "alltoall",
    "alltoall_base", "barrier", "broadcast", "gather", "recv", "recv_anysource", "reduce",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip


@contextmanager
def around_collectives(begin: Callable[[], bool], end: Callable[[], None]) -> Iterator[None]:
    """Call `begin` before and `end` behind everything that issues or awaits a collective.

    Where `begin` returns False, its `end` is left out. Collectives that torch.compile takes into a
    graph are not seen.
    """
    places: list[tuple[Any, str]] = [
        (dist.ProcessGroup, name) for name in _COLLECTIVES if name in vars(dist.ProcessGroup)
    ]
    places.append((dist.Work, "wait"))
    places += [(RowExchange, name) for name in _OF_ROWS]
    if torch.cuda.is_available():
        places.append((torch.cuda.Stream, "wait_event"))  # wait_stream calls it
    with ExitStack() as stack:
        for owner, name in places:
            # What stands in the class binds `self`; what getattr gives, of a C++ class, would not.
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, _between(begin, end, getattr(owner, name)))
        yield


def _between(
    begin: Callable[[], bool], end: Callable[[], None], method: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or not begin():
            return method(*arguments, **named)
        try:
            return method(*arguments, **named)
        finally:
            end()

    return call
