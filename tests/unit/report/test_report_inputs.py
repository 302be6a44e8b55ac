"""Reading of a run directory: what a resume, a running writer or a broken file does to it."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.errors import UserError
from matformer_dist.report.inputs import read_metrics, read_run


def metrics_file(directory: Path, *lines: Any, end: str = "\n") -> Path:
    path = directory / "metrics.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + end)
    return path


def line(step: int, loss: float | None = 1.0) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "train_loss": {"XL": loss}}


def test_steps_trained_again_replace_the_abandoned_part(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10), line(20), line(30), line(40), line(20, 2.0), line(30))
    found = read_metrics(path)
    assert [item.step for item in found] == [10, 20, 30]
    assert found[1].train_loss == {"XL": 2.0}


def test_lines_behind_the_resumed_step_are_dropped_at_other_steps_too(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10), line(20), line(30), line(15))
    assert [item.step for item in read_metrics(path)] == [10, 15]


def test_truncated_last_line_is_left_out(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10), line(20), '{"step": 30, "tok', end="")
    assert [item.step for item in read_metrics(path)] == [10, 20]


def test_truncated_character_of_the_last_line_is_left_out(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10))
    path.write_bytes(path.read_bytes() + '{"step": 20, "name": "é'.encode()[:-1])
    assert [item.step for item in read_metrics(path)] == [10]


@pytest.mark.parametrize("end", ["\n", ""])
def test_broken_line_in_the_middle_is_named(tmp_path: Path, end: str) -> None:
    path = metrics_file(tmp_path, line(10), '{"step": 20, "tok', line(30), end=end)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: Invalid JSON"):
        read_metrics(path)


def test_broken_last_line_that_was_finished_is_named(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10), '{"step": 20, "tok')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_whole_last_line_of_another_shape_is_named(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10), {"tokens": 5}, end="")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: step"):
        read_metrics(path)


def test_null_and_nan_losses_are_not_numbers(tmp_path: Path) -> None:
    path = metrics_file(tmp_path, line(10, None), line(20, float("nan")), line(30, 3.0))
    losses = [item.train_loss["XL"] for item in read_metrics(path)]
    assert isnan(losses[0]) and isnan(losses[1]) and losses[2] == 3.0


@pytest.mark.parametrize("text", ["", "\n", '{"step": 1'])
def test_metrics_without_a_whole_line_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="no complete line yet"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_missing_files_are_named(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        read_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_run(run)
    with pytest.raises(UserError, match="no run directory"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation.json", "{", r"evaluation\.json: Expecting"),
        ("evaluation.json", '{"step": 1, "tokens": 2}', r"evaluation\.json: submodels"),
        ("samples.json", b"\xff\xfe\xff", r"samples\.json: 'utf"),
        ("samples.json", '[{"submodel": "S", "prompt": ""}]', r"samples\.json: 0\.text"),
        ("submodels/S/submodel.json", "[]", r"S/submodel\.json: Input should be"),
    ],
)
def test_broken_optional_file_is_named(
    make_run: Any, name: str, text: str | bytes, message: str
) -> None:
    run = make_run()
    (run / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_half_a_surrogate_pair_in_a_sample_becomes_a_replacement(make_run: Any) -> None:
    run = make_run()
    sample = {"submodel": "S", "prompt": "p\udcff", "text": "p\udcffx", "seconds": 1}
    (run / "samples.json").write_text(json.dumps([sample]))
    assert read_run(run).samples[0].text == "p\ufffdx"
