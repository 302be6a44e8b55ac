from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from matformer_dist.data.workers import Workers
from matformer_dist.errors import UserError


def work(task: int) -> int:
    """The first takes long, and every third a little; some fail."""
    time.sleep(0.5 if task == 0 else 0.002 * (task % 3 == 0))
    if task == 71:
        raise UserError("task 71 is bad input")
    if task == 81:
        raise KeyError("a mistake of ours")
    if task == 91:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def process_id(task: int) -> int:
    time.sleep(task)
    return os.getpid()


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_results_match_plain_map_in_order_and_errors_come_in_turn() -> None:
    """One start of processes for several questions, as that is what takes time."""
    with Workers(3, work) as workers:
        assert list(workers.map(range(70))) == [i * i for i in range(70)]
        assert list(workers.map([])) == []
        with pytest.raises(UserError, match="task 71 is bad input"):
            list(workers.map([1, 71, 2, 71]))
    with Workers(2, work) as workers:
        results = workers.map(iter([3, 81, 1]))
        assert next(results) == 9
        with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*in work.*KeyError"):
            next(results)
    with Workers(2, work) as workers, pytest.raises(UserError, match="use fewer workers"):
        list(workers.map([1, 91, 2]))


def test_tasks_are_drawn_as_needed_and_their_source_may_fail() -> None:
    drawn = []

    def source() -> Iterator[int]:
        for i in range(60):
            drawn.append(i)
            yield i
        raise UserError("the source is bad")

    with Workers(2, work) as workers:
        for given, result in enumerate(results := workers.map(source()), 1):
            assert result == (given - 1) ** 2
            assert len(drawn) - given <= 8
            if given == 60:
                break
        with pytest.raises(UserError, match="the source is bad"):
            next(results)


def test_leaving_ends_busy_workers_at_once() -> None:
    with Workers(2, process_id) as workers:
        results = workers.map([0, 0, 60, 60, 60])
        processes = {next(results), next(results)}
        started = time.monotonic()
    assert time.monotonic() - started < 40
    assert not any(map(is_alive, processes))


PARENT = """
import os, signal, sys
from matformer_dist.data.workers import Workers
from tests.unit.data.test_workers import process_id
if __name__ == "__main__":
    with Workers(2, process_id) as workers:
        results = workers.map([0.2, 0.2, 1, 1])
        print(next(results), next(results), flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        next(results)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_workers_end_with_a_killed_parent(tmp_path: Path, name: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = str(Path(__file__).parents[3])
    parent = subprocess.run(
        [sys.executable, str(script), name],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert parent.returncode == -getattr(signal, name), parent.stderr
    processes = [int(process) for process in parent.stdout.split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 120
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))
    assert "Traceback" not in parent.stderr
