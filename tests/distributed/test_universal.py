"""Universal checkpoints: ours is read by DeepSpeed, DeepSpeed's converter reads ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matformer_dist.checkpoints.convert import convert
from matformer_dist.checkpoints.deepspeed_files import STATES
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.checkpoints.verify import faults
from matformer_dist.errors import UserError
from matformer_dist.parallel.topology import initialize, leave_groups
from matformer_dist.run_directory import Checkpoint, find_checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.test_resharding import (
    BEFORE,
    Case,
    config_of,
    save,
    train_and_save,
    values,
)
from tests.distributed.training_cases import VOCAB

SOURCES = [Case(2, 2, 1), Case(2, 2, 3, "bf16"), Case(2, 2, 0)]
TARGETS = [Case(2, 2, 1), Case(2, 1, 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("universal")
    run_ranks(2, train_and_save, directory, SOURCES)
    for case in SOURCES:
        convert(str(directory / case.name), directory / f"{case.name}-universal")
    return directory


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    for key, value in values(wanted).items():
        assert torch.equal(values(found)[key], value), key
    assert load_universal(found).optimizer_steps == load_universal(wanted).optimizer_steps


@pytest.mark.parametrize("case", SOURCES)
def test_a_converted_checkpoint_holds_the_same(runs: Path, case: Case) -> None:
    converted = find_checkpoint(runs / f"{case.name}-universal")
    assert faults(converted) == []
    assert str(converted.manifest.layout) == "whole weights"
    assert_same(converted, find_checkpoint(runs / case.name))


def load_by_deepspeed(directory: Path, source: str, by_us: bool) -> None:
    """Into each target, and save what was loaded."""
    from matformer_dist.training.engine import Engine, build_model

    for target in TARGETS:
        topology = initialize(target.tensor)
        kind = "ours" if by_us else "theirs"
        config = config_of(target, directory / f"{kind}-{target.name}")
        engine = Engine(config, build_model(config, VOCAB, topology), topology)
        checkpoint = find_checkpoint(directory / source)
        if by_us:
            engine.load_other_layout(checkpoint, lambda _: None)
        else:
            engine.deepspeed._config.load_universal_checkpoint = True
            engine.load(checkpoint)
        save(config, engine, topology, BEFORE)
        engine.deepspeed.destroy()
        leave_groups()


@pytest.mark.parametrize("by_us", [True, False])
def test_a_converted_checkpoint_is_loaded_at_other_layouts(runs: Path, by_us: bool) -> None:
    source = SOURCES[0].name
    run_ranks(2, load_by_deepspeed, runs, f"{source}-universal", by_us)
    for target in TARGETS:
        loaded = find_checkpoint(runs / f"{'ours' if by_us else 'theirs'}-{target.name}")
        assert_same(loaded, find_checkpoint(runs / source))


def test_deepspeeds_converter_understands_our_rings(runs: Path, tmp_path: Path) -> None:
    """By the description that every checkpoint carries."""
    checkpoint = find_checkpoint(runs / SOURCES[0].name)
    output = tmp_path / "universal"
    words = ["--input_folder", checkpoint.path, "--output_folder", output]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words)],
        check=True,
        capture_output=True,
    )
    model = load_universal(checkpoint)
    for name in model.whole:
        for state in STATES:
            theirs = torch.load(output / "zero" / name / f"{state}.pt", weights_only=False)
            assert torch.equal(theirs["param"], model.value(name, state)), (name, state)


def test_a_damaged_checkpoint_is_not_converted(runs: Path, tmp_path: Path) -> None:
    run = runs / SOURCES[2].name
    with pytest.raises(UserError, match="exists"):
        convert(str(run), runs / f"{run.name}-universal")
    file = next((run / "checkpoints" / f"step-{BEFORE}").glob("*.pt"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match="is not a whole checkpoint"):
            convert(str(run), tmp_path / "new")
    finally:
        file.write_bytes(content)
    assert not list(tmp_path.iterdir())
