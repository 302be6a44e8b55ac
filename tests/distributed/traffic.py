"""The collectives that a rank really takes part in: their number and bytes, by kind and group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from matformer_dist.parallel.sequence import RowExchange
from matformer_dist.parallel.topology import Topology
from matformer_dist.planning.communication import traffic
from matformer_dist.planning.layout import PlannedRun

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


def foretold(run: PlannedRun) -> Traffic:
    """The plan's, in the same form."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for one in traffic(run):
        counts[one.operation, one.group] += one.count
        sizes[one.operation, one.group] += one.bytes
    return {key: (count, sizes[key]) for key, count in counts.items()}


class Recorder:
    """Counts collectives between `begin` and `end`, while it is entered; none of one rank alone.

    Enter it before a process group is made: DeepSpeed looks some functions up only once.
    """

    def __init__(self) -> None:
        self._topology: Topology | None = None
        self._counts: Counter[tuple[str, str]] = Counter()
        self._sizes: Counter[tuple[str, str]] = Counter()
        self._depth = 0
        self._stack = ExitStack()

    def begin(self, topology: Topology) -> None:
        self._counts.clear()
        self._sizes.clear()
        self._topology = topology

    def end(self) -> Traffic:
        self._topology = None
        return {key: (count, self._sizes[key]) for key, count in self._counts.items()}

    def __enter__(self) -> Recorder:
        for operation, name in _EXCHANGES.items():  # sequence parallelism's
            method = self._exchanged(operation, getattr(RowExchange, name))
            self._stack.enter_context(patch.object(RowExchange, name, method))
        for name in _FUNCTIONS:
            if hasattr(dist, name):
                function = self._watched(name, getattr(dist, name))
                self._stack.enter_context(patch.object(dist, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, operation: str, group: str, size: int) -> None:
        self._counts[operation, group] += 1
        self._sizes[operation, group] += size

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        operation, position = _FUNCTIONS[name]

        def call(*arguments: Any, **named: Any) -> Any:
            if self._topology and not self._depth:  # one may be made out of another
                whole = [*arguments, *named.values()][position]
                tensors = whole if isinstance(whole, list) else [whole]
                group = _name(named.get("group") or _group_in(arguments), self._topology)
                if group:
                    self._add(operation, group, sum(t.numel() * t.element_size() for t in tensors))
            self._depth += 1
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1

        return call

    def _exchanged(self, operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(exchange: RowExchange, value: Tensor) -> Any:
            if self._topology:
                times = exchange.size if operation == "all_gather" else 1
                self._add(operation, "tensor", times * value.numel() * value.element_size())
            return method(exchange, value)

        return call


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
