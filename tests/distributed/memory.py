"""Bytes that a rank's tensors take in training steps, exactly: every allocation is counted."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.profiler import ProfilerActivity, profile, record_function

from matformer_dist.config import Config
from matformer_dist.parallel.sequence import RowExchange
from matformer_dist.parallel.topology import initialize, leave_groups
from matformer_dist.training.engine import Engine, build_model
from matformer_dist.training.setup import choose_operators
from tests.distributed.training_cases import passes, synthetic_batches

STEPS = 3


class Measured(NamedTuple):
    """Bytes of one rank."""

    between_steps: int
    at_most: int  # in the last of STEPS steps; before, optimizer states are made


def measure(config: Config, vocab_size: int) -> Measured:
    """Train for a few steps on the ranks that call this together."""
    gc.collect()  # what is left of a run before this one would be freed in it
    with _settled(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        topology = initialize(config.parallel.tensor)
        model = build_model(config, vocab_size, topology)
        choose_operators(config, topology)
        engine = Engine(config, model, topology)
        batches = synthetic_batches(config, topology, vocab_size)
        for step in range(STEPS):
            with record_function("step"):
                engine.train_step(batches, passes(config, engine, topology, step), 1e-3)
    engine.deepspeed.destroy()
    leave_groups()
    return _read(recorded.profiler.kineto_results)


@contextmanager
def _settled() -> Iterator[None]:
    """Go on behind a collective when gloo's thread has let go of its tensors: what is freed there
    is not recorded.

    Each is followed by an empty one of the same group, whose only thread takes it up when it has
    let go of the first.
    """
    nothing, all_reduce = torch.zeros(1), dist.all_reduce

    def settled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            bound = inspect.signature(function).bind(*arguments, **named)
            bound.apply_defaults()
            is_awaited = not bound.arguments["async_op"]
            bound.arguments["async_op"] = True
            work = function(*bound.args, **bound.kwargs)
            all_reduce(nothing, group=bound.arguments["group"])
            return work.wait() and None if is_awaited else work

        return call

    def settled_exchange(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(exchange: RowExchange, rows: Tensor) -> Tensor:
            started = function(exchange, rows)
            all_reduce(nothing, group=_resolve_process_group(GroupName(exchange.group_name)))
            return started

        return call

    with ExitStack() as stack:
        stack.enter_context(patch.object(distributed_c10d, "ProcessGroupGloo", _OneThread))
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            stack.enter_context(patch.object(dist, name, settled(getattr(dist, name))))
        for name in ("start_gather", "start_sum", "total"):
            original = getattr(RowExchange, name)
            stack.enter_context(patch.object(RowExchange, name, settled_exchange(original)))
        yield


class _OneThread(dist.ProcessGroupGloo):
    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [self.create_default_device()]
        options._timeout = timeout
        options._threads = 1
        super().__init__(store, rank, size, options)


def _read(results: Any) -> Measured:
    steps = [event for event in results.events() if event.name() == "step"]
    begun, ended = max((event.start_ns(), event.end_ns()) for event in steps)
    changes = sorted(_changes(results.experimental_event_tree()))
    known: set[int] = set()
    held = between = most = 0
    for at, size, pointer in changes:
        if size < 0 and pointer not in known:
            continue  # of a run before this one
        held += size
        known.add(pointer)
        if at < begun:
            between = held
        elif at <= ended:
            most = max(most, held)
    return Measured(between, most)


def _changes(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(time in ns, bytes, pointer) of every allocation and, below 0, every free."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.alloc_size, fields.ptr
