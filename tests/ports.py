"""Ports at which the ranks of a test may meet."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below those of Slurm's steps (parallel/topology.py) and of the kernel's outgoing connections: of
# the latter, one that is free now may belong to another test's connection before the ranks start.
# Each worker of pytest has its own.
_WORKERS = 64
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = list(range(16_000 + _worker % _WORKERS, 20_000, _WORKERS))
random.shuffle(_ports)
_next_port = itertools.cycle(_ports)


def free_port() -> int:
    """A port that nothing here listens at, and that no other test gets soon."""
    for port in itertools.islice(_next_port, len(_ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")
