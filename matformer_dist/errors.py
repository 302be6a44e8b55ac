"""The one kind of error that is the user's to mend, and the exit codes of every entry point."""

from __future__ import annotations

import errno

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # after a good checkpoint: start the same command again
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it


class UserError(ValueError):
    """Bad input. The message names the value, what is allowed and what to do.

    Entry points print it without a traceback and exit with `EXIT_USER_ERROR`.
    """


class LocalError(UserError):
    """A UserError of one rank that the others do not know of, so that it must say so itself."""


class PreemptedError(Exception):
    """A signal ended a run behind a good checkpoint; exit with `EXIT_PREEMPTED`."""


def as_user_error(error: Exception) -> Exception:
    """A file that cannot be read or written is the user's to mend; other errors as they are."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"cannot write {error.filename}: {error.strerror}; free some space there")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(
            f"cannot use {error.filename}: {error.strerror}; what is read must be readable, for "
            "every rank of a training run, and places that are written to must be writable"
        )
    return error
