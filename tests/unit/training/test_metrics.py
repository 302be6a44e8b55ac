"""metrics.jsonl across resumes, kills and numbers that JSON cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.config import Config
from matformer_dist.config_file import validate_config
from matformer_dist.errors import UserError
from matformer_dist.training.metrics import MetricsLog


def config(run_dir: Path) -> Config:
    tree = {
        "run": {"dir": str(run_dir)},
        "model": {"d_model": 8, "n_layers": 1, "n_heads": 1, "d_ff": 8},
        "data": {"train": [[1, "x"]], "tokenizer": "x"},
        "training": {"steps": 1, "seq_len": 8, "micro_batch_size": 1, "global_batch_size": 1},
    }
    return validate_config(tree, "test")


def written(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_does_its_later_lines_again(tmp_path: Path) -> None:
    log = MetricsLog(config(tmp_path), 0)
    for step in (1, 2, 3):
        log.write({"step": step, "old": True})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 4, "ol')  # killed while it wrote
    log = MetricsLog(config(tmp_path), 2)
    log.write({"step": 3, "old": False})
    log.close()
    assert [(line["step"], line["old"]) for line in written(tmp_path)] == [
        (1, True), (2, True), (3, False),
    ]  # fmt: skip


def test_lines_of_a_run_that_begins_again_are_set_aside(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        log = MetricsLog(config(tmp_path), 0)
        log.write({"step": attempt})
        log.close()
    assert written(tmp_path) == [{"step": 3}]
    aside = [(tmp_path / f"metrics.{n}.jsonl").read_text() for n in (1, 2)]
    assert aside == ['{"step": 1}\n', '{"step": 2}\n']


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[3]", b'{"step": "x"}', b""])
def test_a_damaged_line_is_named_and_nothing_is_dropped(tmp_path: Path, damage: bytes) -> None:
    content = b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is not a line of metrics"):
        MetricsLog(config(tmp_path), 9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(config(tmp_path), 0)
    log.write({"step": 1, "grad_norm": float("inf"), "train_loss": {"S": float("nan"), "XL": 2.5}})
    log.close()
    assert written(tmp_path) == [
        {"step": 1, "grad_norm": None, "train_loss": {"S": None, "XL": 2.5}}
    ]
