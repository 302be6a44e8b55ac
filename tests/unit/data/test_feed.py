"""A feed gives what its source gives, whoever reads it and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from matformer_dist.data.feed import Batch, Feed

CPU = torch.device("cpu")
AHEAD = [0, 1, 3]


def source(count: int, taken: list[int] | None = None) -> Iterator[Batch]:
    for i in range(count):
        if taken is not None:
            taken.append(i)
        yield torch.full((2, 3), i), torch.full((2, 3), -i)


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("ahead", AHEAD)
def test_batches_match_the_source(ahead: int) -> None:
    with Feed(source(9), CPU, ahead) as feed:
        found = list(feed)
        assert list(feed) == []  # its end stays its end
    for (tokens, targets), (wanted, other) in zip(found, source(9), strict=True):
        assert torch.equal(tokens, wanted) and torch.equal(targets, other)
    assert not feeds()


@pytest.mark.parametrize("ahead", AHEAD)
def test_it_reads_ahead_so_far_and_no_further(ahead: int) -> None:
    taken: list[int] = []
    with Feed(source(99, taken), CPU, ahead) as feed:
        next(feed)
        deadline = time.monotonic() + 20
        # One is in the reader's hands, one more in the thread's, which waits for a place.
        while len(taken) < 1 + (ahead and ahead + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(taken) == 1 + (ahead and ahead + 1)
    assert not feeds()


@pytest.mark.parametrize("ahead", AHEAD)
def test_a_failure_is_raised_where_its_batch_would_have_come(ahead: int) -> None:
    def failing() -> Iterator[Batch]:
        yield from source(2)
        raise ValueError("a damaged file")

    with Feed(failing(), CPU, ahead) as feed:
        assert [int(next(feed)[0][0, 0]) for _ in range(2)] == [0, 1]
        with pytest.raises(ValueError, match="a damaged file"):
            next(feed)
        with pytest.raises(StopIteration):
            next(feed)
    assert not feeds()


def test_a_reader_that_leaves_early_ends_the_thread() -> None:
    """Also by an exception, with the queue full, and with the source in no hurry."""

    def slow() -> Iterator[Batch]:
        for batch in source(99):
            time.sleep(0.05)
            yield batch

    def leave(of: Iterator[Batch]) -> None:
        with Feed(of, CPU, 2) as feed:
            next(feed)
            raise KeyboardInterrupt

    for of in (source(99), slow()):
        with pytest.raises(KeyboardInterrupt):
            leave(of)
        assert not feeds()
