"""A rank that cannot begin ends all of them: what it lacks is said on each, and nobody waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from matformer_dist.config import Config
from matformer_dist.errors import UserError
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import tiny_config, tiny_vision_config

LACKING = "rank 1 lacks the operators"


def begin(config: Config) -> str:
    """A run, on a rank 1 that has no operators; what it says."""
    from matformer_dist.parallel.topology import Topology, initialize
    from matformer_dist.training import setup
    from matformer_dist.training.control import Control
    from matformer_dist.training.loop import Run

    topology = initialize(1)

    def choose(config: Config, topology: Topology) -> None:  # noqa: ARG001
        if topology.data_rank == 1:
            raise UserError(LACKING)

    setup.choose_operators = choose
    with Control(topology, 60) as control:
        try:
            Run(config, topology, control)
        except UserError as error:
            return str(error)
    return "it has begun"


@pytest.mark.parametrize("task", ["language", "vision"])
def test_what_one_rank_lacks_fails_all_before_data_are_read(task: str, tmp_path: Path) -> None:
    make = tiny_config if task == "language" else tiny_vision_config
    config = make(run={"dir": str(tmp_path / "run")})
    assert run_ranks(2, begin, config, timeout_s=120) == [LACKING] * 2
    assert not (tmp_path / "run").exists()
