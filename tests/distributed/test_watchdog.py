"""A job ends where no rank goes on, and only there."""

from __future__ import annotations

import time

import torch.distributed as dist

from matformer_dist.parallel.topology import initialize
from matformer_dist.parallel.watchdog import Watchdog
from tests.distributed.ranks import run_ranks

SECONDS = 2.0


def wait_for_a_busy_rank() -> tuple[list[str], list[str]]:
    """Rank 0 waits, rank 1 is busy for longer than is borne, and then is not either: what each was
    told until then, and in the end.
    """
    initialize(1)
    told: list[str] = []
    with Watchdog(SECONDS, report=told.append) as watchdog:
        watchdog.mark("reading")
        begun = time.monotonic()
        while time.monotonic() < begun + 3 * SECONDS:
            if dist.get_rank() == 1:
                watchdog.busy()
            time.sleep(0.1)
        early = list(told)
        while not told and time.monotonic() < begun + 15 * SECONDS:
            time.sleep(0.1)
    return early, told


def test_a_rank_that_waits_for_a_busy_one_does_not_end_the_job() -> None:
    (early, late), (other_early, other_late) = run_ranks(2, wait_for_a_busy_rank)
    assert early == other_early == []
    assert len(late) == 1 and late[0].startswith("no progress for ")
    assert "rank 0 is at reading, and so are all others" in late[0]
    assert other_late == [""]
