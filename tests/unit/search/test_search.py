"""Searches of a run of random weights, whose submodels' losses differ by chance alone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from matformer_dist.cli import app
from matformer_dist.counting import count_parameters
from matformer_dist.data.prepare import prepare_data
from matformer_dist.errors import EXIT_INTERRUPTED, UserError
from matformer_dist.evaluation.loss import measure_sequences
from matformer_dist.evaluation.run import evaluate_run
from matformer_dist.inference.loading import load_model
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting, Submodel, mix_n_match
from matformer_dist.search import measurements
from matformer_dist.search.budget import Budget, short_cost
from matformer_dist.search.choice import _named
from matformer_dist.search.picture import draw_frontier
from matformer_dist.search.predictor import Predictor
from matformer_dist.search.search import Options, search
from matformer_dist.submodels.entry import read_entry
from matformer_dist.submodels.extract import extract
from matformer_dist.submodels.slices import Slice, read_slices
from tests.unit.submodels import synthetic_run
from tests.unit.submodels.run_with_data import write_run_with_data
from tests.unit.submodels.synthetic_run import NESTING, model_config, random_model

LADDER = [str(one) for one in mix_n_match(NESTING, 3)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run_with_data(tmp_path / "run", random_model(model_config(n_kv_heads=2)))


def fits(submodel: Submodel, one: Slice) -> bool:
    return count_parameters(model_config(n_kv_heads=2), 307, submodel).total <= one.budget


def test_frontier_is_never_worse_than_the_heuristic(run: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = search(str(run), progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == found.measured_now
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    known = {one.submodel: one for one in found.all.measured}
    assert set(LADDER) <= set(known)
    for one in found.slices:
        within = [other for other in known.values() if other.parameters <= one.budget]
        assert one.loss == min(other.loss for other in within)
        ladder = [other for other in within if other.submodel in LADDER]
        assert one.heuristic == min(ladder, key=lambda other: other.loss).submodel
        widest = max(mix_n_match(NESTING, 3), key=lambda rung: (fits(rung, one), rung.widths))
        assert str(widest) in {other.submodel for other in ladder}
        if one.submodel in LADDER:
            assert one.gain == 0 and one.found_by != "search"
        gain = known[one.heuristic].loss - one.loss
        assert one.gain == pytest.approx(gain, abs=1e-9) and one.gain >= 0
        assert one.gain_interval[0] - 1e-9 <= one.gain <= one.gain_interval[1] + 1e-9
    assert any(one.found_by == "search" and one.gain > 0 for one in found.slices)


def test_losses_match_evaluate(run: Path) -> None:
    found = search(str(run), [Budget.parse("params=32k")])
    others = [one.submodel for one in found.all.measured]
    evaluated = evaluate_run(str(run), others, device="cpu")
    expected = {entry["submodel"]: entry for entry in evaluated.results}
    assert found.all.units == evaluated.units
    for one in found.all.measured:
        entry = expected[one.submodel]
        for name in ("loss", "agreement", "kl", "loss_interval"):
            assert getattr(one, name) == pytest.approx(entry[name], abs=1e-6), name
        for name in ("parameters", "non_embedding_parameters", "flops"):
            assert getattr(one, name) == entry[name]


def test_search_finds_what_trying_everything_finds(run: Path) -> None:
    every = [Submodel(NESTING, chosen) for chosen in product(range(4), repeat=3)]
    evaluated = evaluate_run(str(run), [str(one) for one in every], device="cpu")
    losses = {entry["submodel"]: entry["loss"] for entry in evaluated.results}
    sizes = {entry["submodel"]: entry["parameters"] for entry in evaluated.results}
    budget = (sizes["S"] + sizes["XL"]) // 2
    best = min(loss for name, loss in losses.items() if sizes[name] <= budget)
    worst = max(loss for name, loss in losses.items() if sizes[name] <= budget)
    options = Options(rounds=3, candidates=4)
    (one,) = search(str(run), [Budget("params", budget)], options=options).slices
    assert one.loss - best < 0.1 * (worst - best)


def test_a_search_goes_on_where_it_was_broken_off(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def breaks(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measure_sequences(*arguments, **options)

    monkeypatch.setattr(measurements, "measure_sequences", breaks)
    with pytest.raises(KeyboardInterrupt):
        search(str(run))
    assert read_slices(run) is None
    (file,) = (run / "measurements").iterdir()
    known = len(file.read_text().split("\n{")) - 1
    assert known == 2 * measurements._AT_ONCE
    with file.open("a") as cut:
        cut.write('\n{"submodel":"S:1,M')  # killed within a line
    monkeypatch.undo()
    found = search(str(run))
    assert found.measured_now == len(found.all.measured) - known
    # What is known counts for all budgets, and another round of candidates follows it.
    again = search(str(run), options=Options(rounds=0))
    assert again.measured_now == 0
    assert again.all.measured == found.all.measured
    assert again.all.slices == found.all.slices


def test_lines_of_an_earlier_version_are_measured_again(run: Path) -> None:
    """They do not tell how many tokens are correct."""
    found = search(str(run))
    (file,) = (run / "measurements").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert all(line.keys() == {"submodel", *measurements._COLUMNS} for line in lines)
    earlier = [{key: line[key] for key in line if key != "correct"} for line in lines[:-1]]
    file.write_text("\n".join(map(json.dumps, [*earlier, lines[-1]])))
    again = search(str(run))
    assert again.measured_now == found.measured_now - 1
    assert again.all.slices == found.all.slices


def test_an_interrupted_command_says_what_is_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "measure_sequences", Mock(side_effect=KeyboardInterrupt))
    done = CliRunner().invoke(app, ["search", str(run), "--device", "cpu"])
    assert done.exit_code == EXIT_INTERRUPTED
    assert "what was measured is kept" in done.stderr


@pytest.mark.parametrize("widths", [[64], [8, 64], [8, 16, 24, 32, 40, 48, 56, 64]])
@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_and_any_granularities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widths: list[int], layers: int
) -> None:
    nesting = Nesting.from_widths(widths)
    monkeypatch.setattr(synthetic_run, "NESTING", nesting)
    run = write_run_with_data(tmp_path / "run", random_model(model_config(n_layers=layers)))
    found = search(str(run), options=Options(points=3, rounds=1))
    cost = {one.submodel: one.parameters for one in found.all.measured}
    assert found.slices[0].submodel == nesting.names[0] and set(nesting.names) <= set(cost)
    largest = Budget("params", cost[nesting.names[-1]])
    (one,) = search(str(run), [largest, largest], options=Options(rounds=0)).slices
    assert one.loss == min(other.loss for other in found.all.measured)
    loaded = load_model(run)
    for one in found.all.slices:
        assert str(loaded.parse(one.name)) == one.submodel


def test_slices_are_taken_by_name(run: Path, tmp_path: Path) -> None:
    found = search(str(run), options=Options(points=6))
    one = next(one for one in found.slices if one.found_by == "search")
    (taken,) = extract(str(run), [one.name], output=tmp_path / "taken")
    assert (taken.submodel, taken.parameters) == (one.submodel, one.parameters)
    assert read_entry(taken.path)["loss"] == one.loss  # as the search measured it
    with pytest.raises(UserError, match="is an extracted model"):
        search(str(taken.path))
    with pytest.raises(UserError, match=f"no slice '77M'.*its slices are .*{one.name}"):
        extract(str(run), ["77M"], output=tmp_path / "other")
    rows = list(csv.DictReader((run / "slices.csv").open()))
    assert [row["name"] for row in rows] == [one.name for one in found.all.slices]
    row = rows[[row["name"] for row in rows].index(one.name)]
    assert [int(row[f"width_{i}"]) for i in range(3)] == one.widths
    assert float(row["loss"]) == one.loss


def test_searches_of_other_budgets_are_joined(run: Path) -> None:
    first = search(str(run), options=Options(points=4))
    second = search(str(run), [Budget.parse("memory=70kB")], options=Options(points=4))
    assert {one.kind for one in second.all.slices} == {"params", "memory"}
    assert {one.kind for one in second.slices} == {"memory"}
    names = [one.name for one in second.all.slices if one.found_by != "uniform"]
    assert len(set(names)) == len(names)
    for one in first.slices:  # or what the second search found to be better
        kept = [other for other in second.all.slices if other.budget <= one.budget]
        assert min(other.loss for other in kept if other.kind == "params") <= one.loss
    slices = json.loads((run / "slices.json").read_text())
    (run / "slices.json").write_text(json.dumps({**slices, "checkpoint_sha256": "of another"}))
    third = search(str(run), [Budget.parse("memory=70kB")])
    assert {one.kind for one in third.all.slices} == {"memory"}


def test_latency_is_measured_once_and_read_again(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = Options(points=3, table=table, context=20)
    first = search(str(run), kind="latency", options=options)
    assert "CPU" in first.all.latency_on and "behind 20 tokens" in first.all.latency_on
    written = json.loads(table.read_text())
    assert written["widths"] == list(NESTING.widths) and min(written["token_ms"]) > 0
    table.write_text(json.dumps({**written, "token_ms": [1.0, 2.0, 1.5, 4.0]}))
    second = search(str(run), [Budget.parse("latency=3ms")], options=options)
    of = {one.submodel: one.latency_ms for one in second.all.measured}
    assert of["S"] == 1 and of["XL"] == 4
    assert of["L"] == of["M"] == 2  # wider is never faster
    assert of["S:1,M:2"] == pytest.approx(1 + 2 / 3)
    assert all((one.latency_ms or 9) <= 3 for one in second.slices)
    with pytest.raises(UserError, match=r"below S.*1\.0000ms \(S\) to 4\.0000ms|below S"):
        search(str(run), [Budget.parse("latency=0.5ms")], options=options)
    with pytest.raises(UserError, match="is of another sequences"):
        search(str(run), kind="latency", options=Options(table=table, sequences=4))
    with pytest.raises(UserError, match="is of another dtype"):
        search(str(run), kind="latency", options=Options(table=table, latency_dtype="bf16"))
    table.write_text("{}")
    with pytest.raises(UserError, match="is no latency table"):
        search(str(run), kind="latency", options=options)


def test_latency_is_of_weights_in_its_dtype(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    logits = MatLM.logits

    def watched(lm: MatLM, *arguments: Any) -> Any:
        seen.add(lm.embedding.weight.dtype)
        return logits(lm, *arguments)

    monkeypatch.setattr(MatLM, "logits", watched)
    options = Options(points=3, table=tmp_path / "table.json", latency_dtype="bf16")
    found = search(str(run), kind="latency", options=options)
    assert seen == {torch.bfloat16}
    assert ", bf16, behind" in found.all.latency_on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "--dtype 'fp8' must be one of"), ({"points": 1}, "--points 1 must be 2"),
        ({"candidates": 0}, "--candidates 0"), ({"rounds": -1}, "--rounds -1"),
        ({"sequences": 0}, "--latency-sequences 0"),
        ({"latency_dtype": "fp8"}, "--latency-dtype 'fp8' must be one of"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_picture_is_drawn(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = search(str(run), options=Options(points=4))
    draw_frontier(found.all, "params", found.nesting, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_file_of_slices_ends_a_search_before_it_measures(run: Path) -> None:
    for text in ("{", '{"format": 2}', "[]"):
        (run / "slices.json").write_text(text)
        with pytest.raises(UserError, match=r"slices.json .*; delete it and run"):
            search(str(run))
    assert not (run / "measurements").exists()


def test_losses_that_are_not_finite_are_named(tmp_path: Path) -> None:
    lm = random_model(model_config(n_kv_heads=2))
    dict(lm.named_parameters())["final_norm.weight"].data[3] = float("nan")
    run = write_run_with_data(tmp_path / "run", lm)
    with pytest.raises(UserError, match=r"loss of XL is not finite.*run@STEP"):
        search(str(run))
    assert not (run / "measurements").exists()


def test_damaged_measurements_are_made_again(run: Path) -> None:
    found = search(str(run))
    (file,) = (run / "measurements").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    lines[1]["nll"][0] = float("nan")
    lines[2]["nll"].pop()
    lines[3]["submodel"] = 7
    damaged = [b"\xff\xfe", b"null", b"[1]", b"[" * 100_000]
    file.write_bytes(b"\n".join([*(json.dumps(line).encode() for line in lines), *damaged]))
    again = search(str(run), options=Options(rounds=0))
    assert again.measured_now == 3 and again.all.measured == found.all.measured


def test_slices_of_other_data_are_not_joined(run: Path, tmp_path: Path) -> None:
    search(str(run), options=Options(points=4))
    first = (run / "slices.json").read_text()
    for i, file in enumerate((run / "texts").iterdir()):
        file.write_text(f"{file.read_text()} {i} other words of another file\n")
    other = tmp_path / "other"
    prepare_data([run / "texts"], other, tokenizer=run / "tokenizer.model", workers=1)
    second = search(str(run), [Budget.parse("memory=70kB")], options=Options(data=other))
    assert second.all.units == json.loads(first)["units"]
    assert {one.kind for one in second.all.slices} == {"memory"}


def test_each_budget_that_is_asked_for_has_its_answer(run: Path) -> None:
    """Also where one submodel is the best within several, and where an earlier search knew it."""
    first = search(str(run), options=Options(points=30))
    best = next(one for one in first.slices if one.found_by == "search")
    budgets = [one.budget for one in first.all.slices if one.budget > best.budget]
    largest = first.all.measured[-1].parameters
    between = Budget("params", (best.budget + min(budgets, default=largest)) / 2)
    asked = [between, Budget("params", best.budget), between]
    found = search(str(run), asked, options=Options(rounds=0))
    assert [one.budget for one in found.slices] == [between.limit, best.budget]
    assert {(one.submodel, one.name) for one in found.slices} == {(best.submodel, best.name)}
    assert [one.budget for one in found.all.slices if one.submodel == best.submodel] == [
        best.budget
    ]


def test_two_searches_at_once_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        if not said:
            command = [sys.executable, "-m", "matformer_dist.cli", "search", str(run)]
            other = subprocess.run(command, capture_output=True, text=True, check=False)
            said.append(f"{other.returncode} {other.stderr}")
        return measure_sequences(*arguments, **options)

    monkeypatch.setattr(measurements, "measure_sequences", meanwhile)
    search(str(run), options=Options(points=3, rounds=0))
    assert said[0].startswith("2 error: another search of") and "Traceback" not in said[0]


def test_slices_of_other_weights_are_not_taken_by_name(run: Path) -> None:
    found = search(str(run), options=Options(points=6))
    one = next(one for one in found.slices if one.found_by == "search")
    written = json.loads((run / "slices.json").read_text())
    (run / "slices.json").write_text(json.dumps({**written, "checkpoint_sha256": "0", "step": 4}))
    with pytest.raises(UserError, match=f"other weights, those of step 4.*{one.submodel}"):
        load_model(run).parse(one.name)
    with pytest.raises(UserError, match="other weights"):
        extract(str(run), [one.name], output=run / "taken")


def test_what_becomes_of_earlier_slices_is_said(run: Path) -> None:
    quick = Options(points=3, rounds=0)
    assert search(str(run), options=quick).notes == []
    assert search(str(run), options=quick).notes == []
    (note,) = search(str(run), options=replace(quick, batches=1)).notes
    assert note.startswith("replaced: slices chosen on 144 other validation tokens")
    written = json.loads((run / "slices.json").read_text())
    (run / "slices.json").write_text(json.dumps({**written, "checkpoint_sha256": "0", "step": 3}))
    (note,) = search(str(run), options=quick).notes
    assert note == "replaced: slices of other weights, those of step 3"
    (gone,) = search(str(run), [Budget.parse("memory=70kB")], options=quick).slices
    (note,) = search(str(run), options=replace(quick, dtype="fp32")).notes
    assert note.startswith(f"no slices any more: {gone.name}, whose memory or latency")


def test_a_loss_on_other_data_is_not_in_the_model_card(run: Path, tmp_path: Path) -> None:
    for data in (run / "validation", None):
        search(str(run), options=Options(points=3, rounds=0, data=data))
        (one,) = extract(str(run), ["M"], output=tmp_path / "m", force=data is None)
        assert (read_entry(one.path)["loss"] is None) == (data is not None)
    (run / "slices.json").unlink()
    evaluate_run(str(run), data=run / "validation", device="cpu")
    (one,) = extract(str(run), ["M"], output=tmp_path / "m", force=True)
    assert read_entry(one.path)["loss"] is None


@pytest.mark.parametrize("words", [["--frontier", "flops"], ["--points", "3"]])
def test_options_of_a_frontier_are_refused_with_a_budget(run: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["search", str(run), "--budget", "params=32k", *words])
    assert isinstance(done.exception, UserError) or done.exit_code == 2
    assert "is for whole frontiers" in f"{done.exception} {done.output}"


def test_a_table_of_another_machine_is_measured_again_where_it_is_asked_for(run: Path) -> None:
    options = Options(points=3, rounds=0, context=20, sequences=2)
    search(str(run), kind="latency", options=options)
    table = run / "latency.json"
    written = json.loads(table.read_text())
    other = {**written, "device": "a GPU", "token_ms": [1.0, 2.0, 3.0, 4.0]}
    table.write_text(json.dumps(other))
    named = search(str(run), kind="latency", options=replace(options, table=table))
    assert named.all.latency_on.startswith("a GPU")  # as it was meant
    (run / "slices.json").unlink()
    plain = Options(points=3, rounds=0)
    assert search(str(run), options=plain).all.latency_on == ""
    assert json.loads(table.read_text()) == other
    found = search(str(run), kind="latency", options=plain)
    assert found.all.latency_on.startswith("CPU")
    again = json.loads(table.read_text())
    assert again["device"] == written["device"]
    assert (again["context"], again["sequences"]) == (20, 2)  # as it was


def test_options_of_latency_ask_for_it(run: Path) -> None:
    found = search(str(run), options=Options(points=3, rounds=0, context=7))
    assert "behind 7 tokens" in found.all.latency_on


def test_losses_of_other_sequences_are_not_taken_for_known(run: Path, tmp_path: Path) -> None:
    """Nor are as many of other data."""
    first = search(str(run), options=Options(points=3, rounds=0))
    for file in (run / "texts").iterdir():
        file.write_text(" ".join(reversed(file.read_text().split())))
    other = tmp_path / "other"
    prepare_data([run / "texts"], other, tokenizer=run / "tokenizer.model", workers=1)
    second = search(str(run), options=Options(points=3, rounds=0, data=other))
    assert second.all.units == first.all.units
    assert second.measured_now == first.measured_now
    assert second.all.measured[0].loss != first.all.measured[0].loss


def test_slices_whose_memory_is_counted_anew_are_not_kept(run: Path) -> None:
    search(str(run), [Budget.parse("memory=70kB"), Budget.parse("params=32k")])
    (written,) = {one.memory_bytes for one in read_slices(run).slices if one.kind == "memory"}  # type: ignore[union-attr]
    kept = search(str(run), [Budget.parse("flops=60k")], options=Options(dtype="fp16"))
    assert {one.kind for one in kept.all.slices} == {"params", "flops", "memory"}
    other = search(str(run), [Budget.parse("flops=60k")], options=Options(dtype="fp32"))
    assert {one.kind for one in other.all.slices} == {"params", "flops"}
    assert written not in {one.memory_bytes for one in other.all.measured}


def test_each_round_predicts_from_all_that_is_known(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    narrow = Predictor(1.0, -np.ones((3, 3)))  # in whose eyes the narrowest are best

    def corrected(self: Predictor, losses: Any) -> Predictor:
        told.append(len(losses))
        return narrow if len(told) == 2 else self

    monkeypatch.setattr(Predictor, "corrected", corrected)
    search(str(run), [Budget.parse("params=36k")], options=Options(rounds=2, candidates=2))
    assert told[1] == told[0] + 2
    (file,) = (run / "measurements").iterdir()
    names = [json.loads(line)["submodel"] for line in file.read_text().splitlines() if line]
    measured = [NESTING.parse(name, 3) for name in names]
    steps = [
        sum(chosen)
        for chosen in product(range(4), repeat=3)
        if Submodel(NESTING, chosen) not in measured[:-2]
    ]
    assert sorted(sum(one.granularities) for one in measured[-2:]) == sorted(steps)[:2]


def test_latency_is_of_a_token_behind_its_context(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    logits = MatLM.logits

    def watched(lm: MatLM, tokens: Any, submodel: Any, cache: Any) -> Any:
        seen.add((str(submodel), tuple(tokens.shape), tuple(cache.lengths)))
        return logits(lm, tokens, submodel, cache)

    monkeypatch.setattr(MatLM, "logits", watched)
    options = Options(points=3, table=tmp_path / "table.json", sequences=2, context=20)
    search(str(run), kind="latency", options=options)
    assert seen == {(name, (2, 1), (20, 20)) for name in NESTING.names}


def test_slices_within_a_latency_outlast_a_search_without(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = Options(table=table, sequences=2, context=20)
    search(str(run), [Budget.parse("params=32k")], options=options)
    assert table.exists()  # measured where it is named, whatever the budgets are of
    written = json.loads(table.read_text())
    table.write_text(json.dumps({**written, "token_ms": [1.0, 2.0, 3.0, 4.0]}))
    first = search(str(run), [Budget.parse("latency=2.5ms")], options=Options(table=table))
    assert "2 sequences together" in first.all.latency_on  # of the table
    second = search(str(run), [Budget.parse("flops=60k")])
    assert {one.kind for one in second.all.slices} == {"params", "latency", "flops"}
    assert second.all.latency_on == first.all.latency_on
    table.write_text(json.dumps({**written, "token_ms": [1.0, 2.0, 3.0, 5.0]}))
    third = search(str(run), [Budget.parse("flops=60k")], options=Options(table=table))
    costs = {one.submodel: one.latency_ms for one in third.all.measured}
    for one in third.all.slices:
        assert one.latency_ms == costs[one.submodel]
    table.write_text(json.dumps({**written, "token_ms": [1.0, 2.0, 3.0, float("inf")]}))
    with pytest.raises(UserError, match="is no latency table"):
        search(str(run), kind="latency", options=Options(table=table))


def test_names_have_as_many_digits_as_tell_them_apart(run: Path) -> None:
    one = next(one for one in search(str(run)).slices if one.found_by == "search")
    near = [
        one.model_copy(update={"parameters": size, "name": ""})
        for size in (1_314_000, 1_314_400, 1_322_000)
    ]
    uniform = one.model_copy(update={"parameters": 1_322_000, "name": "M"})
    assert [found.name for found in _named([*near, uniform])] == [
        "1.3140M",
        "1.3144M",
        "1.32M",
        "M",
    ]


def test_a_slice_keeps_its_name_where_others_collide(run: Path) -> None:
    found = search(str(run), options=Options(points=30))
    sizes: dict[str, list[int]] = {}
    for one in found.all.slices:
        if one.found_by != "uniform":
            sizes.setdefault(short_cost("params", one.parameters), []).append(one.parameters)
            assert Budget.parse(f"params={one.name}").limit == pytest.approx(
                one.parameters, rel=0.005
            )
    names = {one.name for one in found.all.slices}
    assert {name for name, of in sizes.items() if len(of) == 1} <= names
    assert not {name for name, of in sizes.items() if len(of) > 1} & names
