"""The `matformer` command: argument parsing only; the work is done by what each command calls.

A module here is a group of commands; its import adds them to the application.
"""

from __future__ import annotations

import signal
import sys

from matformer_dist.cli import (
    checking,
    choosing,
    generating,
    judging,
    making,
    retrieving,
)
from matformer_dist.cli.app import app
from matformer_dist.errors import EXIT_USER_ERROR, UserError, as_user_error

__all__ = ["app", "checking", "choosing", "generating", "judging", "main", "making", "retrieving"]


def main() -> None:
    """Run the command; what the user can mend is one message and exit code 2.

    SIGINT and SIGTERM end it as exceptions do, so that what was begun is cleaned away.
    """
    signals: list[int] = []

    def end(number: int, _: object) -> None:
        signals.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        app()
    except Exception as error:
        if signals:  # compiled code may make an error of its own of what a handler raises
            sys.exit(128 + signals[0])
        if not isinstance(said := as_user_error(error), UserError):
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
