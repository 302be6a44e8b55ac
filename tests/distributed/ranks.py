"""Run a function on real gloo ranks, each a process of its own, and bring back what they return."""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from matformer_dist.parallel.topology import quiet_libraries
from tests.forked import FORKED, become_rank
from tests.ports import free_port

quiet_libraries()  # before a test module imports DeepSpeed, and for the ranks' processes too


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 600
) -> list[Any]:
    """`function(*arguments)` on `world_size` ranks; their results by rank.

    The function must stand at module level. The ranks find each other by the variables that a
    launcher would set. The first rank to fail ends all, and its traceback is raised here.
    """
    port = free_port()
    results: Any = FORKED.Queue()
    processes = [
        FORKED.Process(
            target=_rank_main, args=(rank, world_size, port, results, function, arguments)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _collect(processes: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        try:
            rank, value, failure = results.get(timeout=1)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead:
                raise AssertionError(f"a rank died with exit codes {dead}") from None
            if time.monotonic() > deadline:
                raise AssertionError(f"only ranks {sorted(found)} answered in time") from None
            continue
        if failure is not None:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        found[rank] = value
    return [found[rank] for rank in range(len(processes))]


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    become_rank(rank, world_size, port)
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
