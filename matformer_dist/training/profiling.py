"""Traces of chosen steps by torch's profiler, for https://ui.perfetto.dev."""

from __future__ import annotations

import gzip
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from matformer_dist.errors import UserError
from matformer_dist.training.timing import Clock

_MOST_STEPS = 50  # of one trace: events of more would fill memory, and no viewer opens them


@dataclass(frozen=True)
class Wanted:
    """Ranges of steps to trace, in order, with a gap between any two; and the ranks that do."""

    ranges: tuple[range, ...] = ()
    ranks: tuple[int, ...] = ()

    @staticmethod
    def parse(steps: str | None, ranks: str | None, total_steps: int, world_size: int) -> Wanted:
        """From --profile and --profile-ranks (else rank 0), such as `10-12` or `10,20-22`.

        UserError for what is no such list, or no step or rank of the run.
        """
        if steps is None:
            if ranks is not None:
                raise UserError(
                    f"--profile-ranks {ranks} traces nothing without --profile; add the steps, or "
                    "leave --profile-ranks out"
                )
            return Wanted()
        chosen = _numbers("--profile", steps, "steps", 1, total_steps)
        ranges = tuple(_joined(chosen))
        for one in ranges:
            if len(one) > _MOST_STEPS:
                raise UserError(
                    f"--profile {steps}: steps {_named(one)} are {len(one)} in one trace, which "
                    f"would not open; at most {_MOST_STEPS} may follow one another"
                )
        chosen_ranks = _numbers(
            "--profile-ranks", "0" if ranks is None else ranks, "ranks", 0, world_size - 1
        )
        return Wanted(ranges, tuple(sorted(chosen_ranks)))

    def check_start(self, step: int) -> None:
        """UserError where steps are among the `step` ones that a resumed run has done."""
        done = [_named(one) for one in self.ranges if one.start <= step]
        if done:
            raise UserError(
                f"--profile asks for {', '.join(done)}, but the run goes on behind step {step}; "
                "choose later steps, or leave --profile out"
            )


def _numbers(option: str, text: str, what: str, first: int, last: int) -> set[int]:
    """Numbers and ranges with commas between them, from first to last."""
    chosen: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", item, re.ASCII)
        low = int(match[1]) if match else 1
        high = int(match[2] or low) if match else 0
        if low > high:
            raise UserError(f"{option} {text!r} must be {what} such as 10, 10-12 or 10,20-22")
        if low < first or high > last:
            raise UserError(
                f"{option} {text}: the run has {what} {first} to {last}, and {item.strip()} is "
                f"not among them"
            )
        chosen.update(range(low, high + 1))
    return chosen


def _joined(numbers: set[int]) -> Iterator[range]:
    """The longest ranges that make up the numbers."""
    for first in sorted(n for n in numbers if n - 1 not in numbers):
        last = first
        while last + 1 in numbers:
            last += 1
        yield range(first, last + 1)


def _named(steps: range) -> str:
    return f"{steps.start}" if len(steps) == 1 else f"{steps.start}-{steps.stop - 1}"


class Profiler:
    """Writes traces into `directory`, a file for each range of steps and rank."""

    def __init__(
        self,
        ranges: tuple[range, ...],
        directory: Path,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._ranges = ranges
        self._directory = directory
        self._clock = clock
        self._say = say
        self._profile: profile | None = None
        self._first: int | None = None  # step of the trace that is being recorded
        self._last = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around an optimizer step: traces it where it is asked for."""
        if self._profile is None and any(r.start in (step, step + 1) for r in self._ranges):
            # One step ahead where there is one: setting up would be part of the first traced one.
            self._profile = self._prepared()
        ends = [r.stop - 1 for r in self._ranges if step in r]
        if not ends:
            yield
            return
        if self._first is None:
            assert self._profile is not None
            self._profile.start_trace()
            self._first, self._clock.labels = step, True
        with record_function(f"step {step}"):
            yield
        self._last = step
        if ends == [step]:
            self.close()

    def _prepared(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        prepared = profile(activities=activities, record_shapes=True)
        prepared.prepare_trace()
        return prepared

    def close(self) -> None:
        """Write the trace that is recorded, up to its last whole step; also when a run ends."""
        recorded, first = self._profile, self._first
        self._profile, self._first, self._clock.labels = None, None, False
        if recorded is None or first is None:
            return
        recorded.stop_trace()
        if self._last < first:
            return
        steps = range(first, self._last + 1)
        path = self._directory / f"step-{_named(steps)}-rank{dist.get_rank()}.json.gz"
        try:
            _write(recorded, path)
        except OSError as error:  # no reason to end a training run, and other ranks go on
            print(f"warning    cannot write the trace {path}: {error.strerror}", file=sys.stderr)
            return
        self._say(f"profile    {path}: open it in https://ui.perfetto.dev")


def _write(recorded: profile, path: Path) -> None:
    """Beside its place first: torch would put a trace of any size below /tmp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, whole = path.with_suffix(""), path.with_suffix(".gz.tmp")
    try:
        recorded.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(whole, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        whole.replace(path)
    finally:
        plain.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)
