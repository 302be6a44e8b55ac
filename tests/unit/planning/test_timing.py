"""Times of a plan, and what it prints of them, against sums by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from matformer_dist.planning import plan
from matformer_dist.planning.communication import Collective
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.proposal import candidates, changed
from matformer_dist.planning.timing import collective_seconds, step_time
from tests.unit.planning.test_plan import CONFIGS, H100, order, run_plan, shipped, text_of

# Of a token of the Llama-style 2.6B, 24 layers: attention 3072 x (2 x 3072 + 2 x 1024), FFN
# 3 x 3072 x width, QK^T and PV over 4096 positions of 3072 each, head 3072 x 32000.
WIDTHS = (1024, 2048, 4096, 8192)
FORWARD = {
    width: 2 * 24 * (3072 * 8192 + 3 * 3072 * width) + 24 * 4 * 4096 * 3072 + 2 * 3072 * 32000
    for width in WIDTHS
}


def seconds_of(run: PlannedRun, operation: str, group: str, size: int) -> float:
    one = Collective(operation, group, "", 3, size)  # type: ignore[arg-type]
    return collective_seconds(one, run, H100)


def test_arithmetic_takes_activated_flops_at_the_assumed_mfu() -> None:
    run = PlannedRun(shipped("llama/2.6b-8gpu.yaml"), 32000, 8)
    flops = 3 * sum(FORWARD.values()) / 4 * 512 * 4096  # per_sequence: a quarter of the tokens each
    time = step_time(run, H100)
    assert time.compute == pytest.approx(flops / (8 * 989e12 * 0.4), rel=1e-9)
    assert time.recompute == 0
    full = changed(run.config, 8, checkpointing="full")
    assert full is not None
    # All again but the FFN's last GEMM, the head, and what is not of a block.
    again = flops / 3 - 512 * 4096 * (
        2 * 3072 * 32000 + 2 * 24 * 3072 * sum(WIDTHS) / 4
    )  # fmt: skip
    time = step_time(PlannedRun(full, 32000, 8), H100)
    assert time.recompute == pytest.approx(again / (8 * 989e12 * 0.4), rel=1e-9)


def test_a_ring_is_as_fast_as_the_slowest_link_on_its_way() -> None:
    config = changed(shipped("llama/2.6b-64gpu.yaml"), 64, tensor=4)
    assert config is not None
    run = PlannedRun(config, 32000, 16)
    inside = 3 / 4 * 1e9 / 450e9 + 3 * 2 * 5e-6  # 450 GB/s, two rounds of 5 us, three times
    assert seconds_of(run, "all_gather", "tensor", 10**9) == pytest.approx(inside)
    assert seconds_of(run, "all_reduce", "tensor", 10**9) == pytest.approx(2 * inside)
    outside = 15 / 16 * 1e9 / 50e9 + 3 * 4 * 15e-6
    assert seconds_of(run, "reduce_scatter", "data", 10**9) == pytest.approx(outside)
    for node in (2, 6):  # too small for a copy of the model; one that copies do not divide
        machine = replace(H100, devices_per_node=node)
        over = collective_seconds(Collective("all_gather", "tensor", "", 3, 10**9), run, machine)
        assert over == pytest.approx(3 / 4 * 1e9 / 50e9 + 3 * 2 * 15e-6)
    one_node = replace(H100, devices_per_node=64)
    over = collective_seconds(Collective("all_gather", "data", "", 3, 10**9), run, one_node)
    assert over == pytest.approx(15 / 16 * 1e9 / 450e9 + 3 * 4 * 5e-6)


def test_copies_of_a_model_stay_inside_nodes() -> None:
    asked = order("paper/78m.yaml", 12)
    batch = asked.config.training.model_copy(update={"global_batch_size": 48})
    config = asked.config.model_copy(update={"training": batch})
    for node, wanted in ((6, {1, 2}), (4, {1, 2, 4}), (12, {1, 2, 4})):  # of 16 heads
        machine = replace(H100, devices_per_node=node)
        found = candidates(config, asked.outputs, 12, machine)
        assert {one.run.tensor for one in found} == wanted


def test_what_is_printed_follows_from_the_options(tmp_path: Path) -> None:
    options = {
        "--memory": "100", "--peak-tflops": "500", "--link": "100", "--network": "10",
        "--mfu": "0.5", "--tokens": "1e9", "--price": "3", "--gpus": "16",
    }  # fmt: skip
    words = [word for pair in options.items() for word in pair]
    done = run_plan([str(CONFIGS / "llama/2.6b-8gpu.yaml"), *words], tmp_path)
    assert done.returncode == 0, done.stderr
    run = PlannedRun(shipped("llama/2.6b-8gpu.yaml"), 32000, 16)
    compute = 3 * sum(FORWARD.values()) / 4 * 512 * 4096 / (16 * 500e12 * 0.5)
    # Two nodes: gradients are reduced and weights gathered at 10 GB/s; all-reduces of the weights
    # with and of those without decay, all-gathers of the same.
    ring = 3 * 15 / 16 * 2 * run.parameters / 10e9 + (2 * 2 + 2) * 4 * 15e-6
    step = compute + ring
    rate = 512 * 4096 / step
    hours = 1e9 / rate / 3600
    rows = dict(re.findall(r"│ (.+?) +│ +(.+?) │", done.stdout))
    assert rows["tokens/s"] == f"{rate / 1000:.3g}k"
    assert rows["MFU"] == f"{0.5 * compute / step:.1%}"
    assert rows["a step, nothing overlapped"] == f"{step:.3g} s"
    assert rows["1B tokens"] == f"{int(hours)}h{int(hours % 1 * 60):02}m"
    assert float(rows["cost"]) == pytest.approx(hours * 16 * 3, rel=0.005)
    assert "of 100 GiB, " in done.stdout


def test_what_is_not_planned_is_said() -> None:
    asked = order("llama/2.6b-8gpu.yaml", 8)
    said = "time that it saves is not in the plan"
    assert said not in text_of(plan.show_plan(asked))
    compiled = asked.config.training.model_copy(update={"compile": True})
    config = asked.config.model_copy(update={"training": compiled})
    assert said in text_of(plan.show_plan(replace(asked, config=config)))
    zero = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    config = asked.config.model_copy(update={"deepspeed": zero})
    shown = text_of(plan.show_plan(replace(asked, config=config)))
    assert "the time that offloading takes" in shown and "on the host, for each rank" in shown
