"""Layouts one after the other in one process leave no groups, nor their threads, behind."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import run_ranks


def threads_by_layout(layouts: list[int]) -> list[int]:
    """Threads of this rank behind each layout of so many tensor ranks, when it is left again."""
    from matformer_dist.parallel.topology import initialize, leave_groups

    found = []
    for tensor in layouts:
        initialize(tensor)
        leave_groups()
        found.append(len(list(Path("/proc/self/task").iterdir())))
    return found


def test_leaving_a_layout_ends_the_threads_of_its_groups() -> None:
    for first, *later in run_ranks(2, threads_by_layout, [1, 2, 1]):
        assert later == [first] * 2
