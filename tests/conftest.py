"""What all tests share: one thread a process, and tests of several ranks take turns."""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported, here and in the ranks that tests start: they share the cores already.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="all layouts of four ranks, more steps, and ten times as many kills of a run",
    )


class _ProcessesTakeTurns(LoadScopeScheduling):
    """One worker runs the distributed tests, one the end-to-end tests, one those of cluster; the
    rest is shared.

    Those start several ranks or a whole command for each of their steps: more of them at once would
    only wait for each other.

    The mark xdist_group would do, but pytest 9.2 ignores it without a word
    (pytest-dev/pytest-xdist#1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        kind = nodeid.split("/")[1]
        return kind if kind in ("distributed", "end_to_end", "cluster") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ProcessesTakeTurns(config, log)
