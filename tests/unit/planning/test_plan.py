from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from matformer_dist.config import Config
from matformer_dist.config_file import load_config
from matformer_dist.deepspeed_section import check_deepspeed_section
from matformer_dist.errors import UserError
from matformer_dist.models.building import build_model
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import TensorParallel
from matformer_dist.planning import machines, plan
from matformer_dist.planning.communication import traffic
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.machines import DEVICES, Machine, device_called, find_device
from matformer_dist.planning.memory import estimate_memory, memory_by_moment
from matformer_dist.planning.proposal import candidates, changed
from matformer_dist.planning.timing import step_time
from matformer_dist.units import short_bytes

CONFIGS = Path(__file__).parents[3] / "launch" / "configs"
SHIPPED = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*/*.yaml"))
ALONE = ("llama/2.6b-1gpu.yaml", "vision/digits.yaml")
H100 = Machine("H100", round(79.6 * 2**30), 989)


def shipped(name: str) -> Config:
    return load_config(CONFIGS / name, if_open=plan.IF_OPEN)


def outputs_of(config: Config) -> int:
    of_imagenet_21k = 21843
    return config.model.known_outputs or of_imagenet_21k


def order(name: str, devices: int, machine: Machine = H100) -> plan.Order:
    config = shipped(name)
    return plan.Order(config, outputs_of(config), devices, machine, units=10**9)


def text_of(parts: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in parts:  # type: ignore[attr-defined]
        console.print(part)
    return console.export_text()


def test_all_sizes_of_the_issue_are_shipped() -> None:
    assert SHIPPED == [
        "llama/2.6b-1gpu.yaml", "llama/2.6b-64gpu.yaml", "llama/2.6b-8gpu.yaml",
        "paper/180m.yaml", "paper/2.6b.yaml", "paper/310m.yaml", "paper/463m.yaml",
        "paper/78m.yaml", "paper/850m.yaml",
        "vision/digits.yaml", "vision/vit-b16.yaml", "vision/vit-l16-finetune.yaml",
        "vision/vit-l16.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("name", SHIPPED)
def test_planned_weights_are_those_of_the_model(name: str, tensor: int) -> None:
    config = shipped(name)
    run = PlannedRun(config, outputs_of(config))
    if tensor > 1:
        other = changed(config, tensor, tensor=tensor, micro=2)  # which mixup needs
        assert other is not None
        run = PlannedRun(other, run.outputs)

    class Meta(Initializer):
        def parameter(self, *arguments, **named):  # type: ignore[no-untyped-def]
            with torch.device("meta"):
                return super().parameter(*arguments, **named)

    ranks = TensorParallel(0, tensor)
    nestings = [config.granularities] * config.model.n_layers
    with torch.device("meta"):
        model = build_model(config.model, nestings, run.outputs, Meta(0), ranks)
    assert sum(parameter.numel() for parameter in model.parameters()) == run.parameters


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_configuration_fits_where_it_says(name: str) -> None:
    devices = {"llama/2.6b-64gpu.yaml": 64}.get(name, 1 if name in ALONE else 8)
    asked = order(name, devices)
    run = PlannedRun(asked.config, asked.outputs, devices // asked.config.parallel.tensor)
    assert run.micro_batches >= 1
    assert estimate_memory(run).total_bytes <= H100.usable_bytes
    shown = text_of(plan.show_plan(asked))
    assert "fits" in shown and "proposal: parallel.tensor=" in shown


def test_proposals_fit_and_are_sorted_by_time() -> None:
    asked = order("paper/2.6b.yaml", 16)
    found = candidates(asked.config, asked.outputs, 16, H100)
    assert found
    for one in found:
        assert one.memory.total_bytes <= H100.usable_bytes
        assert one.run.world_size == 16
        assert one.run.config.training.global_batch_size == 1024
    times = [one.time.total for one in found]
    assert all(a <= b * 1.02 for a, b in pairwise(times))


def test_a_model_too_large_for_one_device_is_cut() -> None:
    small = replace(H100, memory_bytes=24 * 2**30)
    best = candidates(order("llama/2.6b-8gpu.yaml", 8).config, 32000, 8, small)[0]
    assert best.run.tensor > 1 or best.run.config.zero_stage > 1
    shown = text_of(plan.show_plan(order("llama/2.6b-8gpu.yaml", 8, small)))
    assert "more than the 22.1 GiB to plan with" in shown
    assert "no layout fits" in text_of(
        plan.show_plan(order("llama/2.6b-8gpu.yaml", 8, replace(H100, memory_bytes=2**30)))
    )


def test_what_is_proposed_a_run_would_take() -> None:
    asked = order("llama/2.6b-8gpu.yaml", 8)
    fp32 = asked.config.training.model_copy(update={"precision": "fp32"})
    for training, section, wanted in (
        (asked.config.training, {}, {1, 2, 3}),
        (fp32, {}, {0, 1, 2, 3}),
        (fp32, {"offload_optimizer": {"device": "cpu"}}, {1, 2, 3}),
        (fp32, {"stage": 3, "offload_param": {"device": "cpu"}}, {3}),
    ):
        deepspeed = {"zero_optimization": section}
        update = {"training": training, "deepspeed": deepspeed}
        found = candidates(asked.config.model_copy(update=update), asked.outputs, 8, H100)
        for one in found:
            check_deepspeed_section(one.run.config, one.run.data_size)
        # Of layouts that deal weights to several data-parallel ranks.
        assert {one.run.config.zero_stage for one in found if one.run.data_size > 1} == wanted


@pytest.mark.parametrize(
    ("name", "gib", "seq_len", "checkpointing", "sequence"),
    [
        ("llama/2.6b-1gpu.yaml", 60, 4096, "none", False),
        ("llama/2.6b-1gpu.yaml", 56, 4096, "selective", False),
        ("llama/2.6b-1gpu.yaml", 80, 32768, "full", False),
        ("llama/2.6b-8gpu.yaml", 16, 4096, "selective", True),
    ],
)
def test_as_little_is_spent_on_memory_as_there_is_need_for(
    name: str, gib: int, seq_len: int, checkpointing: str, sequence: bool
) -> None:
    asked = order(name, 8 if "8gpu" in name else 1, replace(H100, memory_bytes=gib * 2**30))
    config = asked.config.model_copy(
        update={
            "model": asked.config.model.model_copy(update={"max_seq_len": seq_len}),
            "training": asked.config.training.model_copy(update={"seq_len": seq_len}),
        }
    )
    best = candidates(config, asked.outputs, asked.devices, asked.machine)[0]
    assert best.run.config.training.activation_checkpointing == checkpointing
    assert best.run.config.parallel.sequence == sequence
    assert type(config).model_validate(best.run.config.model_dump(mode="json"))
    shown = text_of(plan.show_plan(replace(asked, config=config)))
    assert f"parallel.sequence={str(sequence).lower()} " in shown
    for less in ("none", "selective", "full"):
        if less == checkpointing:
            break
        assert f"activation checkpointing {less}: " in shown
    assert ("parallel.sequence false: " in shown) == sequence
    assert (" SP x " in shown) == (asked.devices > 1)


def test_sweep_has_a_row_for_each_number_of_devices() -> None:
    shown = text_of(plan.show_sweep(order("llama/2.6b-64gpu.yaml", 64)))
    for devices in plan.SWEEP:
        assert any(f" {devices} " in line for line in shown.splitlines()), devices


def test_slower_links_lengthen_a_step_by_the_bytes_of_a_ring() -> None:
    config = shipped("llama/2.6b-8gpu.yaml")
    run = PlannedRun(config, 32000, 8)
    fast, slow = (
        step_time(run, replace(H100, link_gb_per_second=speed, link_latency_us=0))
        for speed in (450, 45)
    )
    # An all-reduce of all gradients and an all-gather of all weights: 3 (n - 1) / n times 2 bytes.
    assert fast.data_collectives == pytest.approx(3 * 7 / 8 * 2 * run.parameters / 450e9, rel=1e-4)
    assert slow.data_collectives == pytest.approx(10 * fast.data_collectives)
    assert fast.compute == slow.compute > 0


def test_gpus_are_known_by_what_the_driver_calls_them() -> None:
    called = {name: device_called(name) for name in machines._CALLED}
    assert set(called.values()) == set(DEVICES.values())
    assert called["NVIDIA H100 80GB HBM3"] == DEVICES["h100"]
    assert device_called("NVIDIA H100 NVL") is None, "its rates are others"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'h1000' is not known; known are .*h100"):
        find_device("h1000")
    assert find_device("H100") == DEVICES["h100"]
    with pytest.raises(UserError, match="--gpus 12 is no whole number of nodes of 8"):
        plan.check_order(12, H100)
    with pytest.raises(UserError, match=r"leaves data\.tokenizer open"):
        load_config(CONFIGS / "paper/78m.yaml")
    command = [str(CONFIGS / "demo.yaml")]
    done = run_plan(command, tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "--vocab-size" in done.stderr
    done = run_plan([*command, "--vocab-size", "4000", "--gpus", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "proposal" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "inf"], "'--memory'"),
        (["--tokens", "inf"], "'--tokens'"),
        (["--gpus", "0"], "'--gpus'"),
        (["--scale-batch"], "--scale-batch is for --sweep"),
        (["--sweep", "--gpus", "16"], "leave --gpus 16 out"),
        (["--sweep", "--gpus-per-node", "3"], "--gpus-per-node 3: the sweep's 8 to 4096 devices"),
        (["--vocab-size", "32001"], "--vocab-size 32001 is not model.vocab_size, which is 32000"),
        (
            ["parallel.tensor=8", "model.vocab_size=3"],
            "3 tokens or classes leave the last of 8 tensor-parallel ranks without one",
        ),
        (["deepspeed.zero_optimization.stage=0"], "stage 0 with training.precision bf16"),
    ],
)
def test_what_the_command_does_not_take_is_named(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    done = run_plan([str(CONFIGS / "llama/2.6b-8gpu.yaml"), *arguments], tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and says in done.stderr


def test_no_number_is_cut_in_a_narrow_pipe(tmp_path: Path) -> None:
    arguments = [str(CONFIGS / "llama/2.6b-8gpu.yaml"), "--sweep", "--price", "2.5"]
    done = run_plan(arguments, tmp_path, COLUMNS="40")
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert all(f" {devices} │" in done.stdout for devices in plan.SWEEP)


def run_plan(
    arguments: list[str], directory: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "matformer_dist.cli", "plan", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env={**os.environ, **environment}
    )


def test_a_batch_that_cannot_be_dealt_is_told_with_the_next_that_can() -> None:
    asked = order("llama/2.6b-8gpu.yaml", 3)
    assert "use 504 or 516, or" in text_of(plan.show_plan(asked))
    tensor = changed(asked.config, 8, tensor=2)
    assert tensor is not None
    shown = text_of(plan.show_plan(replace(asked, config=tensor, devices=3)))
    assert "they are no multiple of parallel.tensor 2" in shown


def test_each_part_of_memory_is_told_at_each_moment() -> None:
    asked = order("llama/2.6b-8gpu.yaml", 8)
    moments = memory_by_moment(PlannedRun(asked.config, asked.outputs, 8))
    shown = text_of(plan.show_plan(asked))
    for one in moments:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {one.moment}")]
        for size in [*one.parts().values(), one.total_bytes]:
            assert short_bytes(size) in line
    assert any(one.workspace_bytes for one in moments if "loss" in one.moment)


def test_each_zero_stage_each_collective_and_the_checkpoint_are_told() -> None:
    asked = order("llama/2.6b-8gpu.yaml", 8)
    own = changed(asked.config, 8, tensor=2)
    assert own is not None
    shown = text_of(plan.show_plan(replace(asked, config=own)))
    run = PlannedRun(own, asked.outputs, 4)
    for one in traffic(run):
        line = next(line for line in shown.splitlines() if f"│ {one.what} " in line)
        assert one.operation.replace("_", "-") in line and f" {one.count:,} " in line
        assert short_bytes(one.bytes) in line
    assert f"a checkpoint, of all ranks: {short_bytes(plan.checkpoint_bytes(run))}" in shown
    parameters = run.parameters
    optimizer = short_bytes(12 * parameters / 4)  # fp32 weights and both moments, cut by four
    for stage in (1, 2, 3):
        line = next(line for line in shown.splitlines() if re.match(rf"│ +{stage} │", line))
        assert optimizer in line, stage
        assert (short_bytes(2 * parameters) in line) == (stage < 3)


def test_scaling_is_the_rate_of_a_device_against_that_of_the_first_row() -> None:
    shown = text_of(plan.show_sweep(order("llama/2.6b-64gpu.yaml", 64)))
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    rates = [float(row[7].strip()[:-1]) * units[row[7].strip()[-1]] / int(row[0]) for row in rows]
    scaling = [float(row[8].strip().rstrip("%")) / 100 for row in rows]
    assert scaling[0] == 1 and scaling[-1] < 0.7
    assert scaling == pytest.approx([rate / rates[0] for rate in rates], abs=0.01)


def test_a_neighbour_is_told_at_its_best() -> None:
    """Half the ranks of a copy take half the micro-batch, where the whole batch is one of each."""
    asked = order("llama/2.6b-8gpu.yaml", 8)
    training = asked.config.training.model_copy(update={"seq_len": 1})
    config = asked.config.model_copy(update={"training": training})
    shown = text_of(plan.show_plan(replace(asked, config=config)))
    assert "proposal: parallel.tensor=8 " in shown
    assert "parallel.tensor 4, at best with parallel.tensor=4 " in shown


def test_a_sweep_with_a_growing_batch_keeps_to_that_batch() -> None:
    asked = order("llama/2.6b-1gpu.yaml", 8)
    small = asked.config.training.model_copy(update={"global_batch_size": 2})
    asked = replace(asked, config=asked.config.model_copy(update={"training": small}))
    shown = text_of(plan.show_sweep(asked, scales_batch=True))
    rows = [line.split("│") for line in shown.splitlines() if line.startswith("│")]
    assert [int(row[1]) for row in rows] == list(plan.SWEEP)
    for row in rows:  # a quarter of a sequence a device
        data_ranks, (micro, times) = int(row[2].split("x")[1]), row[4].split("x")
        assert data_ranks * int(micro) * int(times) == int(row[1]) // 4, row
