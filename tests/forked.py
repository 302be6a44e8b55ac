"""Processes that need not import torch, DeepSpeed and Megatron-Core again, which takes seconds."""

from __future__ import annotations

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])
