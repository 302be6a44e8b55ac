"""Bytes that a rank's tensors take in training steps, exactly: every allocation is counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
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
    """Wait until gloo's thread has let go of a tensor: what is freed there is not recorded."""

    def waited(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            work = function(*arguments, **named)
            if work is not None:
                work.wait()
            time.sleep(0.01)
            return work

        return call

    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(dist, name, waited(getattr(dist, name))))
        wait = RowExchange.wait

        def waited_for(exchange: RowExchange, started: Tensor) -> Tensor:
            result = wait(exchange, started)
            time.sleep(0.01)
            return result

        stack.enter_context(patch.object(RowExchange, "wait", waited_for))
        yield


def _read(results: Any) -> Measured:
    steps = [event for event in results.events() if event.name() == "step"]
    begun, ended = max((event.start_ns(), event.end_ns()) for event in steps)
    changes = sorted(_changes(results.experimental_event_tree()))
    sizes: dict[int, int] = {}
    held = between = most = 0
    for at, size, pointer in changes:
        if size < 0 and pointer not in sizes:
            continue  # of a run before this one
        held += size
        sizes[pointer] = size
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
