"""The two hosts of the session (see hosts.py) and runs short enough to be trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.slurm import PROGRAMS, Slurm
from tests.end_to_end.conftest import corpus, write_config

__all__ = ["corpus"]  # a fixture of these tests, too


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if lacks := why_not():
        pytest.skip(lacks)
    with Hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Slurm:
    if lacks := why_not(*PROGRAMS):
        pytest.skip(lacks)
    return Slurm(hosts)


def config_of(run: Path, data: Path, steps: int, **sections: dict[str, object]) -> Path:
    """A run of two ranks; `run`.yaml. Every step is logged, and its checkpoints are kept."""
    tree: dict[str, dict[str, object]] = {
        "training": {
            "steps": steps, "seq_len": 16, "micro_batch_size": 4, "global_batch_size": 8,
            "precision": "fp32",
        },
        "evaluation": {"every": 0, "batches": 1},
        "checkpoint": {"every": 20},
        "logging": {"every": 1, "tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return write_config(run.with_suffix(".yaml"), data, run, **tree)
