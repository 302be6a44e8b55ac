"""The collectives that a rank really takes part in: their number and bytes, by kind and group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from matformer_dist.parallel.sequence import RowExchange
from matformer_dist.parallel.topology import Topology

Traffic = dict[tuple[str, str], tuple[int, int]]  # (operation, group): (count, bytes)

# A function of torch.distributed: what it does, and which argument is the whole tensor.
_FUNCTIONS = {
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "_all_gather_base": ("all_gather", 0),
    "all_gather": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "all_to_all_single": ("all_to_all", 0),
}

_EXCHANGES = {"all_gather": "start_gather", "reduce_scatter": "start_sum", "all_reduce": "total"}


@contextmanager
def recorded(topology: Topology) -> Iterator[Traffic]:
    """Collectives while it is entered, filled in at its end; none over groups of one rank."""
    found: Traffic = {}
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    depth = 0

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        operation, position = _FUNCTIONS[name]

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal depth
            whole = [*arguments, *named.values()][position]
            tensors = whole if isinstance(whole, list) else [whole]
            group = _name(named.get("group") or _group_in(arguments), topology)
            if group and not depth:  # one may be made out of another
                counts[operation, group] += 1
                sizes[operation, group] += sum(t.numel() * t.element_size() for t in tensors)
            depth += 1
            try:
                return function(*arguments, **named)
            finally:
                depth -= 1

        return call

    def exchanged(operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(exchange: RowExchange, value: Tensor) -> Any:
            size = value.numel() * value.element_size()
            counts[operation, "tensor"] += 1
            sizes[operation, "tensor"] += size * (exchange.size if operation == "all_gather" else 1)
            return method(exchange, value)

        return call

    with ExitStack() as stack:
        for operation, name in _EXCHANGES.items():  # sequence parallelism's
            method = exchanged(operation, getattr(RowExchange, name))
            stack.enter_context(patch.object(RowExchange, name, method))
        for name in _FUNCTIONS:
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, watched(name, getattr(dist, name))))
        yield found
    found.update({key: (counts[key], sizes[key]) for key in counts})


def _group_in(arguments: tuple[Any, ...]) -> Any:
    return next((a for a in arguments if isinstance(a, dist.ProcessGroup)), None)


def _name(group: Any, topology: Topology) -> str:
    """tensor, data, or the ranks; empty for one rank alone."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(ranks) == 1:
        return ""
    for name, known in (("tensor", topology.tensor.group), ("data", topology.data_group)):
        if ranks == dist.get_process_group_ranks(known):
            return name
    return str(ranks)
