"""The section on adaptive retrieval: where its points lie, what its rows and sentences say."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.errors import UserError
from matformer_dist.report.charts import Chart, Hover
from matformer_dist.report.inputs import read_run
from matformer_dist.report.page import write_report
from matformer_dist.report.retrieval import Retrieval, read_rows
from matformer_dist.report.retrieval_charts import retrieval_charts
from tests.unit.report.synthetic_retrieval import entry, write_retrieval
from tests.unit.report.test_report_page import HOSTILE, Page, edit, page_of

NESTED = [
    entry("S", 0.720, 100),
    entry("S:2,M:2", 0.7651, 130, kind="heuristic"),
    entry("M", 0.766, 160),
    entry("S:3,XL:1", 0.75, 180, kind="mix"),
    entry("XL", 0.770, 200),
]


def with_entries(run: Path, entries: list[dict[str, Any]]) -> Retrieval:
    write_retrieval(run)
    edit(run / "retrieval.json", lambda found: found.update(entries=entries))
    rows = read_rows(read_run(run))
    assert rows is not None
    return rows


def table(page: Page) -> list[str]:
    """Rows of the section's table: those behind its head."""
    rows = page.texts("tr")
    first = next(i for i, row in enumerate(rows) if row.startswith("Query encoder Gallery"))
    last = next(i for i, row in enumerate(rows) if row.startswith("chance"))
    return rows[first : last + 1]


def places(chart: Chart, style: str) -> list[tuple[float, float]]:
    paths = [mark.path for mark in chart.marks if mark.style == style]
    pairs = [pair.removesuffix("h0").split(",") for path in paths for pair in path.split("M")[1:]]
    return [(float(left) / 1000, float(top) / 1000) for left, top in pairs]


def test_page_has_the_section_only_where_retrieval_was_measured(make_run: Any) -> None:
    run = make_run()
    assert "Adaptive retrieval" not in page_of(run).texts("h2")
    write_retrieval(run)
    assert "Adaptive retrieval" in page_of(run).texts("h2")


def test_table_matches_the_file(make_run: Any) -> None:
    run = make_run()
    written = write_retrieval(run)
    head, *rows, chance = table(page_of(run))
    assert head.endswith("Recall@5 Recall@10 Agreement@10 Pearson Spearman Own image")
    assert len(rows) == len(written["entries"]) == 13 + 3 + 4 + 4 + 1
    nested = [one for one in written["entries"] if one["encoder"] == "nested"]
    xl = next(one for one in nested if one["submodel"] == one["gallery"] == "XL")
    for one in written["entries"]:
        name = one["submodel"] if one["encoder"] == "nested" else one["encoder"]
        gallery = "its own" if one["gallery"] == "own" else one["gallery"]
        (row,) = (row for row in rows if row.startswith(f"{name} {gallery} "))
        accuracy, low, high = (
            100 * one["knn_accuracy"]["1"]["value"],
            *(100 * end for end in one["knn_accuracy"]["1"]["interval"]),
        )
        assert f" {accuracy:.1f} % {low:.1f} to {high:.1f} " in row.replace("−", "-")
        assert f" {100 * one['recall']['5']['value']:.1f} % " in row
        assert f" {100 * one['recall']['10']['value']:.1f} % " in row
        if one is not xl:
            saved = 100 * (1 - one["query_flops"] / xl["query_flops"])
            assert f" {saved:.1f} % {accuracy:.1f} % " in row
            lost = 100 * one["accuracy_lost"]["1"]["value"]
            assert f" {lost:.2f} " in row.replace("−", "-")
        assert f" {one['pearson']['value']:.3f} {one['spearman']['value']:.3f} " in row.replace(
            "−", "-"
        )
    assert chance == "chance – – 1.0 % – – – 4.9 % 9.6 % 0.020 % 0.000 0.000 0.010 %"


WITHIN = "The cheapest query within 0.5 points of XL's 1-NN accuracy is "
OF_LOSS = "95% of the loss:"
SAVES = "% of the compute of a query and"


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({}, f"S:2,M:2: it saves 35.0 {SAVES} loses 0.49 points ({OF_LOSS} 0.09 to 0.89)."),
        (
            {"S:2,M:2": 0.0051},
            f"M: it saves 20.0 {SAVES} loses 0.40 points ({OF_LOSS} 0.00 to 0.80).",
        ),
        ({"S": -0.001}, f"S: it saves 50.0 {SAVES} gains 0.10 points ({OF_LOSS} −0.50 to 0.30)."),
    ],
)
def test_first_sentence_is_of_the_cheapest_query_that_loses_little(
    make_run: Any, losses: dict[str, float], said: str
) -> None:
    assert with_entries(make_run(), with_losses(losses)).sentences == [WITHIN + said]


def test_first_sentence_says_where_no_cheaper_query_loses_little(make_run: Any) -> None:
    entries = with_losses({"S:2,M:2": 0.006, "M": 0.0055, "S": nan})
    (said,) = with_entries(make_run(), entries).sentences
    assert said.startswith("No cheaper query is within 0.5 points of XL's 1-NN accuracy: M comes ")
    assert said.endswith(f"comes nearest, saves 20.0 {SAVES} loses 0.55 points.")


def with_losses(losses: dict[str, float]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(json.dumps(NESTED))
    for one in entries:
        if one["submodel"] in losses:
            lost = losses[one["submodel"]]
            ends = [lost - 0.004, lost + 0.004]
            one["accuracy_lost"]["1"] = {"value": lost, "interval": ends}
    return entries


def test_sentences_compare_galleries(make_run: Any) -> None:
    entries = [
        *NESTED,
        entry("S", 0.717, 100, gallery="own"),
        entry("M", 0.769, 160, gallery="own"),
        entry("XL", 0.712, 100, gallery="own", encoder="vit-s"),
        entry("XL", 0.775, 200, gallery="own", encoder="vit-l"),
        entry("XL", 0.008, 100, gallery="XL", encoder="vit-s"),
        entry("XL", 0.014, 100, gallery="vit-l", encoder="vit-s"),
    ]
    _, own, apart = with_entries(make_run(), entries).sentences
    assert own == (
        "With a gallery of its own in place of XL's, S reaches 71.7 % instead of 72.0 %, M reaches "
        "76.9 % instead of 76.6 %."
    )
    assert apart == (
        "Encoders that were trained apart reach 71.2 to 77.5 % in their own galleries, and 0.8 to "
        "1.4 % (1.1 % on average) in another's, where chance is 1.0 %."
    )


def test_tooltips_lie_on_their_dots(make_run: Any) -> None:
    run = make_run()
    write_retrieval(run)
    rows = read_rows(read_run(run))
    assert rows is not None
    tradeoff, spaces = retrieval_charts(rows)
    for chart, groups in (
        (tradeoff, [rows.nested, rows.own, rows.apart]),
        (spaces, [rows.nested, rows.apart, rows.across]),
    ):
        assert isinstance(chart.hover, Hover)
        drawn = {
            place
            for style in ("dot", "dot big", "ring", "square")
            for place in places(chart, style)
        }
        for (left, top, title, cells), row in zip(
            chart.hover.positions, [row for group in groups for row in group], strict=True
        ):
            assert title == f"{row.name} · gallery: {row.gallery}"
            assert ["1-NN accuracy", f"{row.accuracy_percent:.1f} %"] in cells
            assert top is not None
            assert min(abs(x - left) + abs(y - top) for x, y in drawn) < 2e-3
            assert left == pytest.approx(chart.x.share(row.flops), abs=1e-4)
            assert 1 - top == pytest.approx(chart.y.share(row.accuracy_percent), abs=1e-4)


def test_what_was_trained_apart_has_a_chart_from_zero_on(make_run: Any) -> None:
    run = make_run()
    write_retrieval(run)
    rows = read_rows(read_run(run))
    assert rows is not None
    _, spaces = retrieval_charts(rows)
    assert spaces.y.low == 0 and spaces.y.high > 77
    (chance,) = (mark.path for mark in spaces.marks if mark.style == "dashed")
    height = 1000 * (1 - spaces.y.share(1.0))
    assert chance == f"M0.0,{height:.1f}L1000.0,{height:.1f}"
    write_retrieval(run, apart=False)
    rows = read_rows(read_run(run))
    assert rows is not None
    assert [chart.title for chart in retrieval_charts(rows)] == ["1-NN accuracy against compute"]


def test_numbers_that_are_not_finite_are_left_out(make_run: Any) -> None:
    entries = json.loads(json.dumps(NESTED))
    nothing = {"value": None, "interval": [None, None]}
    entries[2]["knn_accuracy"]["1"] = entries[2]["pearson"] = nothing
    run = make_run()
    rows = with_entries(run, entries)
    (chart,) = retrieval_charts(rows)
    assert isinstance(chart.hover, Hover) and len(chart.hover.positions) == len(NESTED) - 1
    assert len(places(chart, "dot big")) == 2
    (row,) = (row for row in table(page_of(run)) if row.startswith("M XL"))
    assert row.startswith("M XL 160 20.0 % – – ") and " – 0.960 " in row


def test_one_query_encoder_shows_no_tradeoff(make_run: Any) -> None:
    run = make_run()
    rows = with_entries(run, NESTED[-1:])
    assert retrieval_charts(rows) == [] and rows.sentences == []
    assert len(table(page_of(run))) == 3


def test_without_xl_nothing_is_said_to_be_saved(make_run: Any) -> None:
    run = make_run()
    rows = with_entries(run, NESTED[:2])
    assert rows.sentences == []
    assert table(page_of(run))[1].startswith("S XL 100 – 72.0 %")


def test_older_retrieval_says_so(make_run: Any) -> None:
    run = make_run()
    write_retrieval(run, step=200)
    said = "Measured at step 200; the run has trained to step 300 since."
    assert said in page_of(run).texts("p")
    write_retrieval(run)
    assert said not in page_of(run).texts("p")


def test_hostile_text_stays_text(make_run: Any) -> None:
    run = make_run()
    write_retrieval(run)
    scripts = len([tag for tag, _, _ in page_of(run).elements if tag == "script"])

    def spoil(found: dict[str, Any]) -> None:
        found.update(data=HOSTILE, notes=[HOSTILE])
        for one in found["entries"]:
            if one["encoder"] != "nested":
                one["encoder"] = HOSTILE

    edit(run / "retrieval.json", spoil)
    page = page_of(run)
    assert len([tag for tag, _, _ in page.elements if tag == "script"]) == scripts
    assert not [tag for tag, _, _ in page.elements if tag == "img"]
    titles = [at[2] for hover in page.hovers() for at in hover["at"]]
    assert f"{HOSTILE} · gallery: its own" in titles
    assert any(note.startswith("</pre></script><script>alert(1)") for note in page.texts("p"))


def test_broken_file_is_refused(make_run: Any) -> None:
    run = make_run()
    write_retrieval(run)
    edit(run / "retrieval.json", lambda found: found["entries"][2].pop("kind"))
    with pytest.raises(UserError, match=r"retrieval\.json \(entries\.2\.kind: Field required"):
        write_report(run)


@pytest.mark.parametrize(("granularities", "layers"), [(1, 1), (2, 1), (8, 48)])
def test_every_shape_of_model_has_a_section(make_run: Any, granularities: int, layers: int) -> None:
    fractions = [f"1/{2**i}" for i in reversed(range(1, granularities))] + [1]
    run = make_run(layers=layers, fractions=fractions)
    written = write_retrieval(run)
    assert len(table(page_of(run))) == len(written["entries"]) + 2
    assert len(write_report(run).read_bytes()) < 2_000_000
