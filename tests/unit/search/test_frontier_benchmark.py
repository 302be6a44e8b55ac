"""benchmarks.frontier, on a run that learnt nothing: what it tells is true of its own numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import frontier
from matformer_dist.evaluation.run import evaluate_run
from tests.unit.submodels.run_with_data import write_run_with_data
from tests.unit.submodels.synthetic_run import model_config, random_model


def test_what_is_told_follows_from_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run_with_data(tmp_path / "run", random_model(model_config(n_kv_heads=2)))
    (run / "metrics.jsonl").write_text('{"step": 5, "tokens": 240, "step_ms": 20.0}\n')
    output = tmp_path / "frontier.json"
    words = ["frontier", str(run), "--batches", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    frontier.main()
    shown, written = capsys.readouterr().out, json.loads(output.read_text())
    losses = {one["submodel"]: one["loss"] for one in written["measured"]}
    for row in written["slices"]:
        assert row["loss"] == losses[row["slice"]]
        assert row["gain"] == pytest.approx(losses[row["heuristic"]] - row["loss"], abs=1e-9)
        assert row["gain"] >= 0
    neighbours = written["neighbours"]
    assert neighbours["mixed"] == len(losses) - 4 >= 10
    assert neighbours["mixed"] - neighbours["below_narrower"] == len(neighbours["above"])
    assert all(losses[name] > min(losses[one] for one in "SML") for name in neighbours["above"])
    # The unseen sequences are those behind the ones chosen on: together they are what four global
    # batches hold.
    both = evaluate_run(str(run), batches=4, device="cpu", output=tmp_path / "both.json")
    seen = evaluate_run(str(run), batches=2, device="cpu", output=tmp_path / "seen.json")
    for all_, first in zip(both.results, seen.results, strict=True):
        unseen = written["unseen_losses"][all_["submodel"]]
        assert unseen == pytest.approx(2 * all_["loss"] - first["loss"], abs=1e-6)
        assert f"{all_['submodel']} {unseen:.4f}" in shown
