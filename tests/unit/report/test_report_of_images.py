"""The page of a vision encoder's run, beside which the language model's is as it was."""

from __future__ import annotations

import json
import re
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import yaml

from matformer_dist.config_file import load_config
from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.report.charts import Chart, PointHover
from matformer_dist.report.curves import accuracy_chart
from matformer_dist.report.inputs import read_metrics, read_run
from matformer_dist.report.points import frontier, join_points
from matformer_dist.report.tradeoff import accuracy_charts, consistency_charts, loss_charts
from matformer_dist.submodels.formats import FORMATS
from tests.unit.report.conftest import CLASSES, OUTPUTS
from tests.unit.report.synthetic_retrieval import write_retrieval
from tests.unit.report.synthetic_search import write_search
from tests.unit.report.test_report_inputs import metrics_file
from tests.unit.report.test_report_page import Page, edit, edit_metrics, page_of, parsed

OF_TEXT = re.compile(
    "token|perplexity|bits per byte|prompt|speculative|generate|downstream|sample", re.IGNORECASE
)


def complete_run(make_run: Any, **settings: Any) -> Path:
    run: Path = make_run(task="vision", **settings)
    write_search(run)
    write_retrieval(run)
    return run


def edit_config(run: Path, **model: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= model
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def words_of(page: Page) -> str:
    """All that a reader sees, is told by tooltips, or hears; but for the settings."""
    seen = ["p", "th", "td", "dt", "dd", "h2", "h3", "span", "div", "summary", "caption", "label"]
    texts = [text for tag in seen for text in page.texts(tag)]
    texts += page.texts("script", type="application/json")
    texts += [code for code in page.texts("code") if code.startswith("matformer")]
    texts += [attrs["aria-label"] or "" for _, attrs, _ in page.elements if "aria-label" in attrs]
    return "\n".join(texts)


@pytest.mark.parametrize("complete", [True, False])
def test_page_of_images_says_nothing_of_tokens(make_run: Any, complete: bool) -> None:
    if complete:
        run = complete_run(make_run)
    else:
        run = make_run(task="vision", complete=False)
    words = words_of(page_of(run))
    assert [found[0] for found in OF_TEXT.finditer(words.replace(str(run), ""))] == []
    assert words.count("nats per image") > 2 and "images per second" in words


def test_page_of_tokens_says_nothing_of_images(make_run: Any) -> None:
    run = make_run()
    write_search(run)
    words = words_of(page_of(run))
    assert re.findall("image", words.replace(str(run), "")) == []
    assert words.count("nats per token") > 2 and "tokens per second" in words
    assert OF_TEXT.search(words)


def test_opening_table_shows_the_accuracy_that_was_evaluated(make_run: Any) -> None:
    run = make_run(task="vision")
    edit(run / "evaluation.json", lambda e: e["submodels"][0].update(
        loss=2.34567, agreement=0.817, accuracy=0.6543))  # fmt: skip
    page = page_of(run)
    assert page.texts("tr")[0].endswith("Parameters Loss Accuracy Agrees with XL")
    config = load_config(run / "config.yaml")
    size = count_parameters(config.model, len(CLASSES), config.granularities.uniform(0, 4)).total
    assert page.texts("tr")[1] == f"S 128 {size / 1000:.0f} k 2.346 65.4 % 81.7 %"
    assert page.texts("caption")[0].startswith("Loss in nats per image")
    assert {"1.23 M", "4.10 k a step"} <= set(page.texts("dd"))
    assert {"images seen", "images per second"} <= set(page.texts("dt"))


def test_opening_table_takes_the_accuracy_of_training_where_it_is_newer(make_run: Any) -> None:
    run = make_run(task="vision")
    edit(run / "evaluation.json", lambda e: e.update(step=100))
    found = {"S": 0.511, "M": 0.522, "L": 0.533, "XL": 0.544}
    edit_metrics(run, lambda line: line.update(val_accuracy=found) if line["step"] == 300 else None)
    rows = page_of(run).texts("tr")[1:5]
    assert [re.findall(r"5\d\.\d %", row)[0] for row in rows] == [
        "51.1 %", "52.2 %", "53.3 %", "54.4 %",
    ]  # fmt: skip


def test_accuracy_over_steps_matches_the_metrics(make_run: Any) -> None:
    run = make_run(task="vision")
    read = read_run(run)
    chart = accuracy_chart(read)
    assert chart is not None and chart.unit == "% of images, top-1"
    last = read.last.val_accuracy
    assert sorted((label.name, label.value) for label in chart.labels) == sorted(
        (name, f"{100 * share:.1f}") for name, share in last.items()
    )
    of_s = f"{100 * last['S']:.1f}"
    hover = next(one for one in page_of(run).hovers() if one["at"][-1][3][0][1] == of_s)
    assert hover["at"][-1][2] == "step 300 · 1.23 M images"
    assert [row[0] for row in hover["at"][-1][3]] == ["S", "M", "L", "XL"]
    table = next(row for row in page_of(run).texts("tr") if row.startswith("300 1.23 M"))
    losses = [f"{value:.4f}" for value in read.last.val_loss.values()]
    shares = [f"{100 * value:.1f} %" for value in last.values()]
    assert table == " ".join(["300 1.23 M", *losses, *shares])


def test_accuracy_of_the_next_token_is_not_drawn(make_run: Any) -> None:
    run = make_run()
    write_search(run)
    read = read_run(run)
    assert read.last.val_accuracy  # is known
    assert accuracy_chart(read) is None
    assert accuracy_charts(read, join_points(read)) == []


def test_without_accuracies_the_losses_are_shown(make_run: Any) -> None:
    run = make_run(task="vision")
    edit_metrics(run, lambda line: line.pop("val_accuracy", None))
    edit(run / "evaluation.json", lambda e: [
        (one.pop("accuracy"), one.pop("accuracy_interval")) for one in e["submodels"]])  # fmt: skip
    read = read_run(run)
    assert accuracy_chart(read) is None and accuracy_charts(read, join_points(read)) == []
    headings = page_of(run).texts("h3")
    assert "Training and validation loss" in headings and "Loss against parameters" in headings
    assert "Validation accuracy" not in headings


def places(chart: Chart) -> dict[int, tuple[float, float]]:
    assert isinstance(chart.hover, PointHover)
    return {number: (left, top) for left, top, number in chart.hover.positions}


def test_accuracies_lie_where_their_cost_and_share_are(make_run: Any) -> None:
    run = complete_run(make_run)
    read = read_run(run)
    points = join_points(read)
    parameters, flops = accuracy_charts(read, points)
    assert (parameters.x_title, flops.x_title) == ("parameters", "FLOPs an image")
    evaluated = json.loads((run / "evaluation.json").read_text())["submodels"]
    measured = json.loads((run / "slices.json").read_text())["measured"]
    written = {one["submodel"]: one for one in (*evaluated, *measured)}
    for chart, cost in ((parameters, "parameters"), (flops, "flops")):
        found = places(chart)
        assert len(found) == len(points.shown) > 50
        for number, (left, top) in found.items():
            one = written[points.shown[number].submodel]
            assert left == pytest.approx(chart.x.share(one[cost]), abs=1e-3)
            assert top == pytest.approx(1 - chart.y.share(100 * one["accuracy"]), abs=1e-3)
    # What a search would choose is marked, and it chooses by loss.
    best = [p for p in frontier(points.shown, lambda p: p.parameters) if p.kind == "mix"]
    (marked,) = (m for m in parameters.marks if (m.style, m.color) == ("dot", "var(--mix)"))
    assert marked.path.count("M") == len(best) > 0
    keys = {key.name for key in parameters.keys}
    assert "mix on the frontier of losses" in keys and "frontier of all measured" not in keys
    assert "frontier of all measured" in {key.name for key in loss_charts(read, points)[0].keys}
    assert [chart.unit for chart in consistency_charts(read, points)] == [
        "% of images", "nats per image",
    ]  # fmt: skip


def test_accuracy_is_tabled_where_submodels_are(make_run: Any) -> None:
    run = complete_run(make_run)
    page = page_of(run)
    rows = page.texts("tr")
    (evaluated,) = (row for row in rows if row.startswith("S:2,M:2 ") and "extract" in row)
    entry = next(one for one in json.loads((run / "evaluation.json").read_text())["submodels"]
                 if one["submodel"] == "S:2,M:2")  # fmt: skip
    low, high = (f"{100 * end:.1f}" for end in entry["accuracy_interval"])
    assert f"{100 * entry['accuracy']:.1f} % {low} to {high} {entry['loss']:.4f}" in evaluated
    for one in json.loads((run / "slices.json").read_text())["slices"]:
        (row,) = (row for row in rows if row.startswith(f"{one['name']} "))
        assert f" {100 * one['accuracy']:.1f} % {one['loss']:.4f} " in row
    (listed,) = page.data("items")
    assert listed["cells"] == [
        "parameters", "FLOPs an image", "memory", "latency", "accuracy", "95% of it", "loss",
        "95% of it", "agreement", "KL",
    ]  # fmt: skip
    extracted = [json.loads(path.read_text()) for path in run.rglob("submodel.json")]
    for item in extracted:
        assert any(
            row.startswith(f"{item['submodel']} hf ") and f"{100 * item['accuracy']:.1f} %" in row
            for row in rows
        )


@pytest.mark.parametrize("lacks", ["all but training", "all but evaluation", "nothing"])
@pytest.mark.parametrize(
    ("model", "format"),
    [
        ({}, "hf"),
        ({"n_kv_heads": 2}, "native"),
        ({"kv_channels": 16}, "native"),
        ({"pooling": "mean"}, "timm"),
        ({"pooling": "mean", "norm_eps": 1e-5}, "native"),
    ],
)
def test_every_command_is_one_for_images(
    make_run: Any, model: dict[str, Any], format: str, lacks: str
) -> None:
    run = make_run(task="vision", complete=lacks != "all but training")
    edit_config(run, **model)
    expected = {"report", "evaluate", "search", "retrieve", "extract"}
    if lacks == "all but training":
        assert not list(run.rglob("submodel.json"))
    elif lacks == "nothing":
        write_search(run)
        write_retrieval(run)
        expected = {"report", "extract"}
    else:
        expected -= {"evaluate"}
    codes = {code for code in page_of(run).texts("code") if code.startswith("matformer ")}
    calls = [parsed(line) for line in codes]
    assert {name for name, _ in calls} == expected
    for name, options in calls:
        assert Path(options["model" if name == "evaluate" else "run"]) == run
        if name == "evaluate":
            assert options["tasks"] is None
        if name == "extract":
            assert options["format"] == format in FORMATS


def test_outputs_are_counted_where_files_say_them(make_run: Any) -> None:
    language = make_run()
    assert read_run(language).outputs == OUTPUTS["language"]
    edit_config(language, vocab_size=None)
    assert read_run(language).outputs is None


def test_classes_are_counted_where_files_say_them(make_run: Any) -> None:
    run = make_run(task="vision")
    assert read_run(run).outputs == OUTPUTS["vision"]
    edit_config(run, classes=12)
    assert read_run(run).outputs == 12  # the settings come first
    edit_config(run, classes=None)
    for broken in ("{", '{"ant": 1}', "[1, 2]", b"\xff"):
        (run / "classes.json").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        with pytest.raises(UserError, match=r"classes\.json"):
            read_run(run)
    (run / "classes.json").unlink()
    assert read_run(run).outputs is None
    entry = json.loads((run / "evaluation.json").read_text())["submodels"][0]
    assert page_of(run).texts("tr")[1].startswith(f"S 128 {entry['parameters'] / 1000:.0f} k ")
    (run / "evaluation.json").unlink()
    assert page_of(run).texts("tr")[1].startswith("S 128 – ")


def test_lines_of_both_units_are_read(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "tokens": 3, "tokens_per_second": 1.5},
        {"step": 2, "images": 5, "images_per_second": 2.5},
        {"step": 3, "images": 6},
    ]
    first, second, third = read_metrics(metrics_file(tmp_path, *lines))
    assert (first.units, first.units_per_second) == (3, 1.5)
    assert (second.units, second.units_per_second) == (5, 2.5)
    assert third.units == 6 and isnan(third.units_per_second)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: .* step and tokens or images"):
        read_metrics(metrics_file(tmp_path, {"step": 1}))


def test_files_of_earlier_versions_give_the_same_points(make_run: Any) -> None:
    run = make_run()
    write_search(run)
    new = join_points(read_run(run))
    assert not new.notes and all(point.accuracy > 0 for point in new.searched)

    def age(one: dict[str, Any]) -> None:
        one["flops_per_token"] = one.pop("flops")
        del one["accuracy"], one["accuracy_interval"]

    def age_slices(slices: dict[str, Any]) -> None:
        slices["tokens"] = slices.pop("units")
        del slices["unit"]
        for one in (*slices["slices"], *slices["measured"]):
            age(one)

    edit(run / "evaluation.json", lambda e: list(map(age, e["submodels"])))
    edit(run / "slices.json", age_slices)
    old = join_points(read_run(run))
    assert not old.notes
    for before, after in zip(old.shown, new.shown, strict=True):
        assert isnan(before.accuracy) and isnan(before.accuracy_interval[0])
        assert (before.submodel, before.kind) == (after.submodel, after.kind)
        assert (before.parameters, before.flops) == (after.parameters, after.flops)
    edit(run / "slices.json", lambda s: s.pop("tokens"))
    with pytest.raises(UserError, match=r"slices\.json \(units: "):
        read_run(run)
