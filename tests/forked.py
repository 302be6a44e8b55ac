"""Processes that need not import torch, DeepSpeed and Megatron-Core again, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Set the variables that a launcher would; the ranks meet at that port."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
