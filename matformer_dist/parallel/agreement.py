"""Ranks that decide together: what fails on one fails on all, and none is left waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from matformer_dist.errors import UserError, as_user_error

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
            answer[0] = (None, as_user_error(error))
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
        mine = as_user_error(error)
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
