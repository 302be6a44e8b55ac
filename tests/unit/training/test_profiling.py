"""Which steps and ranks --profile and --profile-ranks choose."""

from __future__ import annotations

import pytest

from matformer_dist.errors import UserError
from matformer_dist.training.profiling import Wanted


def parse(steps: str | None, ranks: str | None = None) -> Wanted:
    return Wanted.parse(steps, ranks, total_steps=100, world_size=4)


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("10", [(10, 10)]),
        ("10-12", [(10, 12)]),
        ("20-22,10", [(10, 10), (20, 22)]),
        ("1, 2 - 4,100", [(1, 4), (100, 100)]),
        ("3-5,4-9", [(3, 9)]),
    ],
)
def test_steps_are_joined_to_ranges(text: str, ranges: list[tuple[int, int]]) -> None:
    assert [(r.start, r.stop - 1) for r in parse(text).ranges] == ranges


def test_nothing_is_traced_unless_asked_for() -> None:
    assert parse(None) == Wanted()
    assert parse("1", "0,2-3").ranks == (0, 2, 3)
    assert parse("1").ranks == (0,)
    with pytest.raises(UserError, match="--profile-ranks 1 traces nothing without --profile"):
        parse(None, "1")


@pytest.mark.parametrize(
    ("steps", "ranks", "says"),
    [
        ("", "0", "--profile '' must be steps such as 10, 10-12 or 10,20-22"),
        ("x", "0", "--profile 'x' must be steps"),
        ("10-", "0", "must be steps"),
        ("12-10", "0", "must be steps"),
        ("1,,2", "0", "must be steps"),
        ("-3", "0", "must be steps"),
        ("²", "0", "must be steps"),
        ("9" * 19, "0", "must be steps"),
        ("0", "0", "--profile 0: the run has steps 1 to 100, and 0 is not among them"),
        ("5,99-101", "0", "the run has steps 1 to 100, and 99-101 is not"),
        ("1-100", "0", "steps 1-100 are 100 in one trace, .* at most 50"),
        ("1", "4", "--profile-ranks 4: the run has ranks 0 to 3, and 4 is not"),
        ("1", "all", "--profile-ranks 'all' must be ranks"),
    ],
)
def test_what_cannot_be_traced_is_refused(steps: str, ranks: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(steps, ranks)


def test_steps_that_a_resumed_run_has_done_are_refused() -> None:
    wanted = parse("10-12,20")
    wanted.check_start(9)
    with pytest.raises(UserError, match="asks for 10-12, but the run goes on behind step 10;"):
        wanted.check_start(10)
    with pytest.raises(UserError, match=r"asks for 10-12, 20, but .* behind step 40"):
        wanted.check_start(40)
