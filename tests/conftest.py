"""What all tests share: one thread a process, and tests that start processes take turns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported, here and in the ranks that tests start: they share the cores already.
os.environ["OMP_NUM_THREADS"] = "1"

_WITH_PROCESSES = tuple(Path(__file__).parent / name for name in ("distributed", "end_to_end"))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one worker of pytest-xdist run all tests that start ranks, one behind another."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in _WITH_PROCESSES):
            item.add_marker(pytest.mark.xdist_group("processes"))
