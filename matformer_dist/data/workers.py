"""Processes that apply one function to a stream of tasks.

Why not `concurrent.futures`: its tasks queue without bound, its workers outlive a parent that was
killed, and a running one cannot be stopped.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Generic, TypeVar

from matformer_dist.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers(Generic[Task, Result]):
    """`count` processes that each hold a copy of `function` (which is pickled once).

    As a context manager: leaving it, in whatever way, ends the processes at once. Each has a pipe
    of its own to this process, and ends when this process does, even by SIGKILL. Ctrl-C reaches
    this process only. They are spawned: a script must start its work under
    `if __name__ == "__main__"`, or they would all do it.
    """

    def __init__(self, count: int, function: Callable[[Task], Result]) -> None:
        context = multiprocessing.get_context("spawn")  # no copy of our threads or locks
        self._processes = {}
        resource_tracker.ensure_running()  # or the first process would start it, and unblock Ctrl-C
        interrupt = {signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, interrupt)  # inherited, until they ignore it
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, function), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt)

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks, which are drawn only as they are needed.

        At most four tasks a process are drawn and not yet given back, so memory stays bounded
        however many there are. The first task in order that failed raises its error here.
        """
        source = iter(tasks)
        idle = deque(self._processes)
        running: dict[Connection, int] = {}
        finished: dict[int, Result | Exception] = {}
        drawn = given = 0
        exhausted = False
        while True:
            while idle and not exhausted and drawn - given < 4 * len(self._processes):
                try:
                    self._send(idle[0], next(source))
                    running[idle.popleft()] = drawn
                except StopIteration:
                    exhausted = True
                    break
                except UserError as error:  # of the source: its turn comes after those before it
                    finished[drawn] = error
                    exhausted = True
                drawn += 1
            if given in finished:
                result = finished.pop(given)
                if isinstance(result, Exception):
                    raise result
                given += 1
                yield result
            elif running:
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    finished[running.pop(connection)] = self._receive(connection)
                    idle.append(connection)
            else:
                return

    def _send(self, connection: Connection, task: Task) -> None:
        try:
            connection.send(task)
        except OSError:
            raise self._died(connection) from None

    def _receive(self, connection: Connection) -> Result | Exception:
        try:
            result: Result | Exception = connection.recv()
        except (EOFError, OSError):
            raise self._died(connection) from None
        return result

    def _died(self, connection: Connection) -> Exception:
        process = self._processes[connection]
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return UserError(
                "a worker process was killed, probably because memory ran out; use fewer workers"
            )
        return RuntimeError(f"a worker process ended with exit code {process.exitcode}")


def _serve(connection: Connection, function: Callable[[Task], Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        result: Result | Exception
        try:
            result = function(task)
        except UserError as error:
            result = error
        except Exception:
            result = RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        try:
            connection.send(result)
        except OSError:
            return
