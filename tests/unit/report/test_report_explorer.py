"""What the page carries for its explorer, and the other tables of what commands measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from matformer_dist.errors import UserError
from matformer_dist.report.explorer import explorer_data
from matformer_dist.report.inputs import read_run
from matformer_dist.report.machine import machine_charts, slowest_rank, time_parts
from matformer_dist.report.page import write_report
from matformer_dist.report.points import join_points
from tests.unit.report.synthetic_search import (
    COSTS,
    write_downstream,
    write_search,
    write_speculative,
)
from tests.unit.report.test_report_page import edit, edit_metrics, page_of


def explorer_of(directory: Any) -> Any:
    run = read_run(directory)
    return explorer_data(run, join_points(run))


def test_page_without_a_search_says_which_command_makes_one(make_run: Any) -> None:
    run = make_run()
    assert explorer_of(run) is None
    page = page_of(run)
    assert f"matformer search {run}" in page.texts("code")
    assert not page.data("kinds")


@pytest.mark.parametrize("latency", [True, False])
def test_kinds_of_budget_are_those_that_were_measured(make_run: Any, latency: bool) -> None:
    run = make_run()
    written = write_search(run, latency=latency)["measured"]
    kinds = {kind["kind"]: kind for kind in explorer_of(run)["kinds"]}
    assert list(kinds) == list(COSTS)[: 4 if latency else 3]
    for name, kind in kinds.items():
        costs = [one[COSTS[name]] for one in written]
        assert (kind["low"], kind["high"]) == (min(costs), max(costs))


def test_losses_that_are_not_numbers_are_never_offered(make_run: Any) -> None:
    run = make_run()
    write_search(run)
    broken = [f'"loss": {value}' for value in ("NaN", "Infinity", "-Infinity")]
    content = json.loads((run / "slices.json").read_text())
    first, last = content["measured"][0]["submodel"], content["measured"][-1]["submodel"]
    for i, one in enumerate(content["measured"]):
        if i < 6:
            one["loss"] = float(broken[i % 3].split()[1])
    (run / "slices.json").write_text(json.dumps(content))
    data = explorer_of(run)
    names = [point.submodel for point in join_points(read_run(run)).numbered()]
    offered = {names[number] for number in data["submodels"]}
    assert first not in offered and last in names
    assert data["kinds"][0]["low"] == content["measured"][6]["parameters"]
    write_report(run)  # and the page holds no NaN, which would be no JSON


def test_search_without_a_finite_loss_is_as_none(make_run: Any) -> None:
    run = make_run()
    write_search(run, mixes=0)
    edit(run / "slices.json", lambda s: [one.update(loss=float("nan")) for one in s["measured"]])
    assert explorer_of(run) is None
    assert f"matformer search {run}" in page_of(run).texts("code")


def test_slices_of_another_nesting_are_refused(make_run: Any) -> None:
    run = make_run()
    write_search(run)
    edit(run / "slices.json", lambda s: s["measured"][3].update(submodel="S:3,XXL:1"))
    with pytest.raises(UserError, match=r"slices\.json is not of this run .*'XXL'.*search.* again"):
        write_report(run)


def test_slices_are_tabled_by_name(make_run: Any) -> None:
    run = make_run()
    written = write_search(run)
    rows = page_of(run).texts("tr")
    for one in written["slices"]:
        (row,) = (row for row in rows if row.startswith(f"{one['name']} "))
        assert f" {one['submodel']} " in row and f" {one['heuristic']} " in row
        assert f"{one['loss']:.4f}" in row and f"{one['gain']:+.4f}" in row
        assert row.endswith(one["found_by"])


def test_older_search_says_so(make_run: Any) -> None:
    run = make_run()
    write_search(run, step=200)
    notes = page_of(run).texts("p")
    assert "Searched at step 200; the run has trained to step 300 since." in notes


def test_many_submodels_keep_the_page_small(make_run: Any) -> None:
    run = make_run(layers=48, fractions=[f"1/{2**i}" for i in reversed(range(1, 8))] + [1])
    write_search(run, mixes=2000)
    assert len(write_report(run).read_bytes()) < 2_000_000


@pytest.mark.parametrize(("granularities", "layers"), [(1, 1), (1, 4), (2, 1), (8, 48)])
def test_every_shape_of_model_has_a_page(make_run: Any, granularities: int, layers: int) -> None:
    fractions = [f"1/{2**i}" for i in reversed(range(1, granularities))] + [1]
    run = make_run(layers=layers, fractions=fractions)
    written = write_search(run, mixes=20)
    data = page_of(run).data("kinds")[0]
    assert data["names"] == list(read_run(run).nesting.names)
    largest = max(data["submodels"], key=int)
    assert len(data["submodels"][largest]["layers"]) == layers
    assert len(written["measured"]) >= 1


def test_losses_on_other_sequences_are_not_joined(make_run: Any) -> None:
    """As many tokens are not the same tokens."""
    run = make_run()
    write_search(run)
    assert not join_points(read_run(run)).notes
    edit(run / "evaluation.json", lambda e: e.update(data_sha256="of these"))
    assert not join_points(read_run(run)).notes  # where the search did not say
    edit(run / "slices.json", lambda e: e.update(data_sha256="of others"))
    (note,) = join_points(read_run(run)).notes
    assert "those of evaluation.json are on" in note


def test_evaluation_shows_intervals_kl_and_bits_where_it_has_them(make_run: Any) -> None:
    run = make_run()
    old = page_of(run)
    assert "Bits per byte" not in old.texts("th") and "KL" not in old.texts("th")
    edit(
        run / "evaluation.json",
        lambda e: e["submodels"][2].update(
            loss_interval=[2.1234, 2.9876], kl=0.0512, bits_per_byte=1.4321, perplexity=9.1
        ),
    )
    edit(run / "evaluation.json", lambda e: e["submodels"][3].update(loss_interval=None, kl=None))
    page = page_of(run)
    assert {"Bits per byte", "KL", "95% of it"} <= set(page.texts("th"))
    rows = [row for row in page.texts("tr") if "matformer extract" in row]
    (row,) = (row for row in rows if row.startswith("S:2,M:2"))
    assert "2.1234 to 2.9876" in row and "0.0512" in row and "1.4321" in row
    cells = next(cells for name, cells in page.data("items")[0]["items"] if name == "S:2,M:2")
    assert "2.1234 to 2.9876" in cells and "0.0512" in cells


def test_speculative_decoding_is_tabled_and_says_slower(make_run: Any) -> None:
    run = make_run()
    assert f"matformer speculate {run}" in page_of(run).texts("code")
    write_speculative(run)
    page = page_of(run)
    rows = page.texts("tr")
    assert "S shared auto 84.0 % 3.52 94.2 1.57 ×" in rows
    assert "M own 4 90.0 % 3.70 55.8 0.93 ×, slower" in rows
    assert any("XL alone: 60 tokens/s" in words for words in page.texts("p"))


def test_downstream_results_are_tabled_with_their_errors(make_run: Any) -> None:
    run = make_run()
    assert any(code.startswith(f"matformer evaluate {run} --tasks") for code in
               page_of(run).texts("code"))  # fmt: skip
    write_downstream(run)
    rows = page_of(run).texts("tr")
    assert "Task Metric S XL" in rows
    assert "stdlib_cloze, 1-shot acc 0.450 ± 0.013 0.400 ± 0.013" in rows
    assert "matformer_paper mean 0.500 0.500" in rows


def test_time_parts_weigh_lines_by_their_steps(make_run: Any) -> None:
    run = make_run(steps=40)

    def measure(line: dict[str, Any]) -> None:
        line["time_ms"] = {"data": 10.0, "forward": 30.0, "new part": 0.0}
        line["slowest_rank"] = {"rank": 1, "host": "</script>", "ratio": 1.25}
        line["memory"] = {"allocated_bytes": 3e9, "resident_bytes": line["step"] * 1e7, "rank": 0}

    edit_metrics(run, measure)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    first = json.loads(lines[0]) | {"time_ms": {"data": 50.0, "forward": 30.0, "new part": 0.0}}
    kept = [json.dumps(first), *lines[2:]]  # the second line speaks of twenty steps then
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    read = read_run(run)
    parts = {part["name"]: part for part in time_parts(read)}
    assert list(parts) == ["data", "forward", "new part"]
    assert parts["data"]["ms"] == pytest.approx((10 * 50 + 30 * 10) / 40)
    assert parts["forward"]["share"] == pytest.approx(30 / 50)
    assert "rank 1 on </script>, in 3 of 3 lines" in slowest_rank(read)
    assert "at most 1.25 times" in slowest_rank(read)
    memory = next(chart for chart in machine_charts(read) if chart.title == "Peak memory")
    assert memory.unit == "GB" and len(memory.keys) == 2
    assert "allocated on the GPU 3.00 GB, resident in the process 400 MB" in memory.summary
    assert "data 20 ms 40.0 %" in page_of(run).texts("li")


def test_old_lines_have_memory_but_no_parts(make_run: Any) -> None:
    read = read_run(make_run())
    assert time_parts(read) == [] and slowest_rank(read) == ""
    memory = next(chart for chart in machine_charts(read) if chart.title == "Peak memory")
    assert "812 MB" in memory.summary
