"""Ends a job that hangs, and says which ranks it waits for.

A collective that one rank never joins would hold all others until the library's own timeout, whose
message names nobody. Here every rank tells what it is at, on a thread and through the store that
the job began with, which no collective can block.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from matformer_dist.errors import EXIT_FAILURE

T = TypeVar("T")
_GOES_ON = "goes on"


class Post(NamedTuple):
    """What a rank last told."""

    posts: int  # it has sent
    marks: int  # it has set
    quiet: float  # seconds since it was last known to go on
    at: str  # what it is doing

    def follows(self, before: Post | None) -> bool:
        """Whether the rank has told something since."""
        return before is None or self.posts != before.posts


class Watchdog:
    """Watches this rank while it is entered; `mark` and `busy` tell that it goes on.

    All ranks mark alike; a rank that has less to do for a mark than others waits for them.
    seconds: without progress on any rank after which the job ends, at most seven intervals later.
    hosts: of each rank, by name. report: what ends the job, told the message.
    """

    def __init__(
        self,
        seconds: float,
        hosts: Sequence[str] = (),
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.seconds = seconds
        self.interval = min(5.0, seconds / 4)
        self._hosts = hosts
        self._report = report or _end_process
        self._marks = 0
        self._posts = 0
        self._at = "the start"
        self._marked = time.monotonic()
        self._left = threading.Event()

    def mark(self, at: str) -> None:
        """This rank begins to do `at`."""
        self._at, self._marks, self._marked = at, self._marks + 1, time.monotonic()

    def busy(self) -> None:
        """This rank goes on with what it does; any thread may say so."""
        self._marked = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        # A connection of its own: another thread's wait would hold it.
        self._store = dist.PrefixStore("watchdog", store.clone() if self.ranks > 1 else store)
        self._marked = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(self.interval):
            quiet = time.monotonic() - self._marked
            if quiet <= self.seconds:
                self._answer(self._post, max(self.interval, self.seconds - quiet))
                continue
            # Rank 0 keeps the store: where it is stopped, asking would wait as long as all else.
            said = self._answer(partial(self._message, quiet), 5 * self.interval)
            if said == _GOES_ON:
                continue
            self._report(self._alone(quiet) if said is None else said)
            return

    def _answer(self, ask: Callable[[], T], patience: float) -> T | None:
        """What `ask` returns, or None where the store does not answer in so many seconds."""
        answers: list[T] = []

        def keep() -> None:
            with contextlib.suppress(RuntimeError, dist.DistError):
                answers.append(ask())

        asking = threading.Thread(target=keep, name="watchdog's question", daemon=True)
        asking.start()
        asking.join(patience)
        return answers[0] if answers else None

    def _alone(self, quiet: float) -> str:
        return (
            f"no progress for {quiet:.0f} s: {_named([self.rank], self._hosts)} is at {self._at}; "
            f"no answer from {_named([0], self._hosts)}, which keeps the job's store (stopped, "
            "dead, or cut off)"
        )

    def _post(self) -> None:
        self._posts += 1
        quiet = time.monotonic() - self._marked
        self._store.set(str(self.rank), f"{self._posts}|{self._marks}|{quiet}|{self._at}")

    def _message(self, quiet: float) -> str:
        before = self._read()
        # The others have looked at their own posts meanwhile, and posted again.
        deadline = time.monotonic() + 2 * self.interval
        while time.monotonic() < deadline:
            self._post()
            time.sleep(self.interval / 2)
        now = self._read()
        answering = {r: post for r, post in enumerate(now) if post and post.follows(before[r])}
        if any(post.quiet <= self.seconds for post in answering.values()):
            return _GOES_ON
        if self.rank != min(answering, default=self.rank):
            time.sleep(self.interval)  # one message is enough
            return ""
        return describe(self.rank, before, now, quiet, self._hosts)

    def _read(self) -> list[Post | None]:
        return [self._read_rank(rank) for rank in range(self.ranks)]

    def _read_rank(self, rank: int) -> Post | None:
        if not self._store.check([str(rank)]):
            return None
        posts, marks, quiet, at = self._store.get(str(rank)).decode().split("|", 3)
        return Post(int(posts), int(marks), float(quiet), at)


def describe(
    rank: int,
    before: Sequence[Post | None],
    now: Sequence[Post | None],
    quiet: float,
    hosts: Sequence[str] = (),
) -> str:
    """The message about ranks that stopped posting, or else are behind the one furthest on."""
    waiting = now[rank]
    assert waiting is not None
    text = f"no progress for {quiet:.0f} s: {_named([rank], hosts)} is at {waiting.at}"
    if len(now) == 1:
        return text
    silent = [r for r, post in enumerate(now) if post is None or not post.follows(before[r])]
    furthest = max(post.marks for post in now if post is not None)
    behind = [r for r, post in enumerate(now) if post is not None and post.marks < furthest]
    if silent:
        return f"{text}; no answer from {_named(silent, hosts)} (stopped, dead, or cut off)"
    if behind:
        doing = ", ".join(sorted({post.at for r in behind if (post := now[r])}))
        return f"{text}; waiting for {_named(behind, hosts)}, still at {doing}"
    return f"{text}, and so are all others: a device or the network between them does not answer"


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """The first of `ranks`, and the hosts they are on where the job has several."""
    text = f"rank{'s' * (len(ranks) > 1)} {_first(map(str, ranks))}"
    if len(set(hosts)) > 1:
        text += f" on {_first(dict.fromkeys(hosts[rank] for rank in ranks))}"
    return text


def _first(names: Iterable[str], shown: int = 16) -> str:
    every = list(names)
    return ", ".join(every[:shown]) + (" ..." if len(every) > shown else "")


def _end_process(message: str) -> None:
    if message:
        print(
            f"error: {message}; training.hang_timeout sets how long is waited. Where this rank is:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_FAILURE)
