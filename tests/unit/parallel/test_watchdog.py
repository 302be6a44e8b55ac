"""Which ranks the message about a hang names."""

from __future__ import annotations

import pytest

from matformer_dist.parallel.watchdog import Post, describe

AHEAD = [Post(9, 40, 9.0, "step 40"), Post(9, 40, 9.0, "step 40"), Post(9, 40, 9.0, "step 40")]


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (
            AHEAD,
            [
                Post(11, 40, 9.0, "step 40"),
                Post(9, 40, 9.0, "step 40"),
                Post(11, 40, 9.0, "step 40"),
            ],
            "no answer from rank 1 (",
        ),
        (
            [Post(9, 40, 9.0, "step 40"), None, None],
            [Post(11, 40, 9.0, "step 40"), None, None],
            "no answer from ranks 1, 2 (",
        ),
        (
            AHEAD,
            [
                Post(11, 40, 9.0, "step 40"),
                Post(11, 40, 9.0, "step 40"),
                Post(11, 39, 9.0, "the checkpoint of 39"),
            ],
            "waiting for rank 2, still at the checkpoint of 39",
        ),
        (AHEAD, [Post(11, 40, 9.0, "step 40")] * 3, "and so are all others"),
    ],
)
def test_the_ranks_that_others_wait_for_are_named(
    before: list[Post | None], now: list[Post | None], says: str
) -> None:
    said = describe(0, before, now, 12.3)
    assert said.startswith("no progress for 12 s: rank 0 is at step 40")
    assert says in said


def test_a_thousand_ranks_are_not_all_named() -> None:
    before = [Post(9, 40, 9.0, "a")] * 1000
    said = describe(0, before, [Post(11, 40, 9.0, "a"), *before[1:]], 5)
    assert said.count(",") < 20 and "16 ..." in said


def test_hosts_are_named_where_the_job_has_several() -> None:
    before = [Post(9, 40, 9.0, "a")] * 4
    now = [Post(11, 40, 9.0, "a")] * 2 + before[2:]
    said = describe(1, before, now, 5, ["n1", "n1", "n2", "n2"])
    assert "rank 1 on n1 is at a; no answer from ranks 2, 3 on n2 (" in said
    assert " on n" not in describe(1, before, now, 5, ["n1"] * 4)
