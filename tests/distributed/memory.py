"""Bytes that a rank's tensors take in training steps, exactly: every allocation is counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from matformer_dist.config import Config
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
    return _read(recorded.profiler.kineto_results.events())


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
        yield


def _read(events: list[Any]) -> Measured:
    events = sorted(events, key=lambda event: event.start_ns())
    steps = [event for event in events if event.name() == "step"]
    begun, ended = steps[-1].start_ns(), steps[-1].end_ns()
    held = between = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() < begun:
                between = held
            elif event.start_ns() <= ended:
                most = max(most, held)
    return Measured(between, most)
