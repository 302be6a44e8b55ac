"""From text to a submodel's own text, by the commands that README shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from matformer_dist.training.timing import PARTS
from tests.end_to_end.conftest import matformer, succeed, train, write_config

VOCABULARY = 600


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tensor-parallel ranks under the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(
        folder / "c.yaml", corpus, folder / "run", parallel={"tensor": 2},
        training={"precision": "bf16"}, model={"tied_embeddings": True},
        deepspeed={"zero_optimization": {"stage": 2}},
    )  # fmt: skip
    done = train(config, ranks=2)
    shown = succeed(done)
    for expected in (
        "tensor 2 x data 1, ZeRO 2, bf16",
        "1 ranks x 2 micro-batches",
        f"data       1 x {corpus}",
        "memory",
        "XL",
    ):
        assert expected in shown
    for noise in ("Warning", "WARNING", "Apex", "Transformer Engine", "No CUDA runtime"):
        assert noise not in done.stdout + done.stderr
    return folder / "run"


def activated_flops() -> float:
    """Of a step: forward, dX and dW of 8 sequences, two at each granularity, and the head."""
    d, layers, positions, widths = 32, 2, 32, (8, 16, 32, 64)
    rows = 2 * positions
    attention = layers * (2 * 4 * d * d + 2 * 2 * positions * d)
    ffn = layers * sum(2 * 3 * d * width for width in widths) / 4
    return 3 * 4 * rows * (attention + ffn + 2 * d * VOCABULARY)


def test_training_writes_what_it_promises(trained: Path) -> None:
    lines = metrics(trained)
    for line in lines:
        flops = line["model_tflops_per_second"] * line["step_ms"] * 1e9
        assert flops == pytest.approx(activated_flops(), rel=1e-6)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["tokens"] == line["step"] * 8 * 32
        assert set(line["train_loss"]) == {"S", "M", "L", "XL"}
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0
        assert line["model_tflops_per_second"] > 0 and line["peak_memory_bytes"] > 0
        assert set(line["time_ms"]) == set(PARTS)
        assert all(line["time_ms"][part] > 0 for part in PARTS)
        assert sum(line["time_ms"].values()) == pytest.approx(line["step_ms"])
        assert line["tokens_per_second_per_device"] == line["tokens_per_second"] / 2
        assert line["slowest_rank"]["rank"] in (0, 1) and line["slowest_rank"]["ratio"] >= 1
        assert line["memory"]["resident_bytes"] == line["peak_memory_bytes"]
        assert ("val_loss" in line) == (line["step"] in (3, 6))
    assert set(lines[-1]["val_loss"]) == {"S", "M", "L", "XL", "S:1,L:1"}
    assert lines[-1]["val_loss"]["XL"] < lines[2]["val_loss"]["XL"]
    assert lines[-1]["val_agreement"]["XL"] == 1
    assert lines[-1]["val_accuracy"].keys() == lines[-1]["val_loss"].keys()
    assert all(0 < share < 1 for share in lines[-1]["val_accuracy"].values())
    kept = {path.name for path in (trained / "checkpoints").iterdir()}
    assert kept == {"step-4", "step-6", "latest"}
    (events,) = (trained / "tensorboard").rglob("events.out.tfevents.*")
    logged = EventFileLoader(str(events)).Load()
    tags = {value.tag for event in logged for value in event.summary.value}
    assert {"time_ms/communication", "slowest_rank/ratio", "memory/resident_bytes"} <= tags


def test_submodels_come_out_and_speak(trained: Path, tmp_path: Path) -> None:
    shown = succeed(matformer("evaluate", trained, "--heuristic", "--submodel", "XL:1,S:1"))
    assert "S:1,M:1" in shown
    evaluation = json.loads((trained / "evaluation.json").read_text())
    by_name = {entry["submodel"]: entry for entry in evaluation["submodels"]}
    assert len(by_name) == 8 and by_name["XL:1,S:1"]["kind"] == "mix"
    final = metrics(trained)[-1]["val_loss"]
    for name in ("S", "M", "L", "XL"):  # the run evaluated bf16 weights, this their fp32 masters
        assert by_name[name]["loss"] == pytest.approx(final[name], rel=2e-3)
    for kind, submodel in (("native", "S:1,M:1"), ("hf", "L")):
        output = tmp_path / kind
        succeed(
            matformer(
                "extract", trained, "--submodel", submodel, "--format", kind, "--output", output
            )
        )
        entry = json.loads((output / "submodel.json").read_text())
        assert entry["loss"] == by_name[submodel]["loss"]
        first = succeed(matformer("generate", output, "--prompt", "def ", "--max-new-tokens", 12))
        again = succeed(matformer("generate", output, "--prompt", "def ", "--max-new-tokens", 12))
        assert first.startswith("def ") and first == again
    succeed(matformer("report", trained))
    assert "S:1,M:1" in (trained / "report.html").read_text()
