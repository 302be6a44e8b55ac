"""A checkpoint goes on under any other layout of ranks, as if it had always been trained so."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from matformer_dist.checkpoints.deepspeed_files import STATES
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.config import Config
from matformer_dist.parallel.topology import Topology, initialize, leave_groups
from matformer_dist.run_directory import Checkpoint, find_checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import (
    VOCAB,
    passes,
    synthetic_batches,
    tiny_config,
)

BEFORE, AFTER = 3, 2  # steps


class Case(NamedTuple):
    ranks: int
    tensor: int
    stage: int
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"tp{self.tensor}-dp{self.ranks // self.tensor}-zero{self.stage}-{self.precision}"


FP32 = [
    Case(4, 2, 0),
    Case(1, 1, 0),
    Case(4, 4, 1),
    Case(2, 1, 1),
    Case(4, 2, 2),
    Case(2, 2, 3),
    Case(4, 1, 3),
    Case(1, 1, 2),
]
BF16 = [Case(4, 2, 1, "bf16"), Case(2, 1, 2, "bf16"), Case(2, 2, 3, "bf16"), Case(1, 1, 1, "bf16")]
# Every layout is the target of two others: TP 1 <-> 2 <-> 4, DP 1 <-> 2, ZeRO 0 <-> 1 <-> 2 <-> 3.
PAIRS = [
    (cases[i], cases[(i + step) % len(cases)])
    for cases, steps in ((FP32, (1, 6)), (BF16, (1, 2)))
    for i, step in product(range(len(cases)), steps)
]


def config_of(case: Case, run_dir: Path) -> Config:
    training = tiny_config().training.model_dump(exclude_none=True)
    return tiny_config(
        run={"dir": str(run_dir)},
        parallel={"tensor": case.tensor},
        training={**training, "precision": case.precision, "steps": BEFORE + AFTER},
        deepspeed={"zero_optimization": {"stage": case.stage}},
        objective={"kind": "joint", "distillation": 0.5},
    )


def run_steps(config: Config, engine: Any, topology: Topology, steps: range) -> list[Any]:
    """Losses and gradient norm of each of `steps`."""
    from matformer_dist.training.metrics import LossSums

    batches = synthetic_batches(config, topology)
    sums = LossSums(config.granularities, topology)
    history = []
    for step in range(steps.stop):
        if step not in steps:
            for _ in range(engine.accumulation):
                next(batches)
            continue
        sums.add(engine.train_step(batches, passes(config, engine, topology, step), 3e-3))
        history.append({**sums.take(), "grad_norm": engine.grad_norm})
    return history


def save(config: Config, engine: Any, topology: Topology, step: int) -> None:
    from matformer_dist.checkpoints.store import CheckpointStore
    from matformer_dist.training import setup

    manifest = setup.describe(config, topology, "", VOCAB, step)
    CheckpointStore(config.run.dir, config.checkpoint).save(engine, manifest)


def train_and_save(directory: Path, cases: list[Case]) -> dict[str, list[Any]]:
    """Each case's history behind its checkpoint."""
    from matformer_dist.training.engine import Engine, build_model

    found = {}
    for case in cases:
        topology = initialize(case.tensor)
        config = config_of(case, directory / case.name)
        engine = Engine(config, build_model(config, VOCAB, topology), topology)
        run_steps(config, engine, topology, range(BEFORE))
        save(config, engine, topology, BEFORE)
        found[case.name] = run_steps(config, engine, topology, range(BEFORE, BEFORE + AFTER))
        engine.deepspeed.destroy()
        leave_groups()
    return found


def load_and_train(directory: Path, pairs: list[tuple[Case, Case]]) -> dict[str, list[Any]]:
    """The same of each target that a source's checkpoint was loaded into; saves that too."""
    from matformer_dist.training.engine import Engine, build_model

    found = {}
    for source, target in pairs:
        topology = initialize(target.tensor)
        name = f"{source.name}-to-{target.name}"
        config = config_of(target, directory / name)
        engine = Engine(config, build_model(config, VOCAB, topology), topology)
        seen: list[str] = []
        engine.load_other_layout(find_checkpoint(directory / source.name), seen.append)
        save(config, engine, topology, BEFORE)
        found[name] = run_steps(config, engine, topology, range(BEFORE, BEFORE + AFTER))
        engine.deepspeed.destroy()
        leave_groups()
    return found


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The runs' directory; losses behind every checkpoint, and behind every move of one."""
    directory = tmp_path_factory.mktemp("layouts")
    found: dict[str, list[Any]] = {}
    for ranks in (1, 2, 4):
        cases = [case for case in [*FP32, *BF16] if case.ranks == ranks]
        found |= run_ranks(ranks, train_and_save, directory, cases)[0]
    for ranks in (1, 2, 4):
        pairs = [pair for pair in PAIRS if pair[1].ranks == ranks]
        found |= run_ranks(ranks, load_and_train, directory, pairs)[0]
    return directory, found


def values(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    model = load_universal(checkpoint)
    return {(name, state): model.value(name, state) for name in model.whole for state in STATES}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_moved_checkpoint_is_the_same_and_goes_on_the_same(
    histories: tuple[Path, dict[str, list[Any]]], source: Case, target: Case
) -> None:
    directory, found = histories
    name = f"{source.name}-to-{target.name}"
    before = find_checkpoint(directory / source.name)
    after = find_checkpoint(directory / name)
    for key, value in values(before).items():
        assert torch.equal(values(after)[key], value), key
    assert load_universal(after).optimizer_steps == BEFORE
    for step, (one, other) in enumerate(zip(found[name], found[source.name], strict=True)):
        relative = 1e-6 if source.precision == "fp32" else 0.02
        assert one == pytest.approx(other, rel=relative * (1 + 4 * step)), step
