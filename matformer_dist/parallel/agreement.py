"""Ranks that decide together: what fails on one fails on all, and none is left waiting."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from matformer_dist.errors import UserError

T = TypeVar("T")


def on_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on the main rank, on every rank; its failure fails them all.

    UserError where the main rank met one, or a file that it could not read or write. Without
    process groups `decide` is simply called.
    """
    if not dist.is_initialized():
        return decide()
    answer: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            answer[0] = (decide(), None)
        except Exception as error:
            answer[0] = (None, _as_users(error))
            if not isinstance(answer[0][1], UserError):
                dist.broadcast_object_list([(None, RuntimeError(f"the main rank: {error!r}"))])
                raise
    dist.broadcast_object_list(answer)
    result, failure = answer[0]
    if failure is not None:
        raise failure
    return cast(T, result)


@contextmanager
def agreement() -> Iterator[None]:
    """Raise what any rank raises inside on every rank; UserError as in `on_main`.

    Without process groups, what is raised inside.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = _as_users(error)
    # As text: not every exception can be sent.
    text = None if mine is None else (str(mine), isinstance(mine, UserError))
    everyone = gathered(text)
    if mine is not None and not isinstance(mine, UserError):
        raise mine
    for rank, failure in enumerate(everyone):
        if failure is not None:
            message, is_users = failure
            raise UserError(message) if is_users else RuntimeError(f"rank {rank}: {message}")


def gathered(mine: T) -> list[T]:
    """What every rank has, by rank; without process groups, what this one has."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return cast(list[T], everyone)


def _as_users(error: Exception) -> Exception:
    """A file that cannot be read or written is the user's to mend."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"cannot write {error.filename}: {error.strerror}; free some space there")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(
            f"cannot use {error.filename}: {error.strerror}; every rank must be able to read it, "
            "and the main rank to write below run.dir"
        )
    return error
