"""Thinning, smoothing and the geometry of charts."""

from __future__ import annotations

import json
from itertools import pairwise
from math import isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matformer_dist.report import text
from matformer_dist.report.charts import Axis, Chart, Hover, palette, spread, tick_text
from matformer_dist.report.series import buckets, latest, smooth, thin


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 100, 1001])
def test_thin_keeps_both_ends_and_the_limit(length: int) -> None:
    series = [(step, float(step)) for step in range(length)]
    kept = thin(series, 8)
    assert len(kept) == min(length, 8)
    assert kept[0] == series[0] and kept[-1] == series[-1]
    assert all(a < b for a, b in pairwise(kept))


def test_smooth_matches_plain_means() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    found = [value for _, value in smooth(list(enumerate(values)), 5)]
    plain = [
        values[0],
        sum(values[0:3]) / 3,
        *(sum(values[i - 2 : i + 3]) / 5 for i in range(2, 6)),
        sum(values[4:8]) / 4,
        sum(values[5:8]) / 3,
    ]
    assert found == pytest.approx(plain)


def test_smooth_leaves_numbers_that_are_none_out() -> None:
    found = smooth([(0, 1.0), (1, nan), (2, 3.0), (3, float("inf"))], 3)
    assert found[0] == (0, 1.0) and found[2] == (2, 3.0)
    assert isnan(found[1][1]) and isnan(found[3][1])


def test_buckets_match_plain_extremes() -> None:
    series = [(step, float((step * 7 + 5) % 11)) for step in range(23)]
    found = buckets(series, 6)
    assert len(found) <= 6
    assert found[-1].step == 22
    assert max(b.high for b in found) == max(v for _, v in series)
    assert min(b.low for b in found) == min(v for _, v in series)
    first = [value for _, value in series[:4]]
    assert found[0] == (3, sum(first) / 4, min(first), max(first))


def test_latest_value_is_never_from_the_future() -> None:
    series = [(10, 1.0), (20, 2.0)]
    assert isnan(latest(series, 9))
    assert [latest(series, step) for step in (10, 19, 20, 99)] == [1.0, 1.0, 2.0, 2.0]


positions = st.lists(st.floats(-50, 350), min_size=1, max_size=12)


@given(positions)
def test_spread_labels_never_overlap_and_keep_their_order(wanted: list[float]) -> None:
    placed = spread(wanted, 17, 300)
    ordered = sorted(placed)
    assert all(b - a > 17 - 1e-6 for a, b in pairwise(ordered))
    assert ordered[0] >= -1e-6 and ordered[-1] <= 300 + 1e-6
    ranks = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert [placed[i] for i in ranks] == ordered


def test_spread_moves_only_what_overlaps() -> None:
    assert spread([10.0, 100.0, 102.0, 250.0], 17, 300) == pytest.approx([10, 92.5, 109.5, 250])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_different_round_numbers_inside_the_axis(low: float, length: float) -> None:
    axis = Axis(low, low + length)
    labels = axis.labels()
    assert 2 <= len(labels) <= 9
    assert all(-1e-6 <= share <= 1 + 1e-6 for share, _ in labels)
    if abs(low) < 100 * length:  # else three digits and a letter cannot tell them apart
        assert len({text for _, text in labels}) == len(labels)


def test_tick_texts() -> None:
    assert [t for _, t in Axis(0, 1500).labels()] == ["0", "250", "500", "750", "1,000", "1,250",
                                                      "1,500"]  # fmt: skip
    assert [t for _, t in Axis(0.95e6, 2.4e6, 3).labels()] == ["1.0 M", "1.5 M", "2.0 M"]
    assert tick_text(0.075, 0.025, 0.1) == "0.075"
    assert tick_text(-1.5, 0.5, 2) == "−1.5"
    assert tick_text(20_000, 20_000, 100_000) == "20 k"


@pytest.mark.parametrize("values", [[], [nan], [2.0], [0.0, 0.0], [float("inf"), 1.0]])
def test_axis_of_few_values_has_a_length(values: list[float]) -> None:
    for axis in (Axis.around(values), Axis.from_zero(values)):
        assert axis.high > axis.low
        assert all(axis.low <= value <= axis.high for value in values if abs(value) < 1e300)


def test_line_has_a_gap_where_a_value_is_not_finite() -> None:
    chart = Chart("t", "u", Axis(0, 4), Axis(0, 10))
    chart.line([(0, 0.0), (1, 10.0), (2, nan), (3, 5.0), (4, nan)], "red")
    assert chart.marks[0].path == "M0.0,1000.0L250.0,0.0M750.0,500.0h0"


def test_labels_that_do_not_fit_keep_the_lowest_and_highest() -> None:
    chart = Chart("t", "u", Axis(0, 1), Axis(0, 100), height_px=100)
    chart.label_ends([(f"G{i}", str(i), float(i), "red") for i in range(100)])
    assert len(chart.labels) == 5
    assert {"G0", "G99"} <= {label.name for label in chart.labels}


def test_hover_json_cannot_end_its_script() -> None:
    hover = Hover(head=["</script><script>alert(1)//"])
    hover.add(0.5, None, "<!--", [["a", "b"]])
    assert "<" not in hover.json()
    assert json.loads(hover.json())["at"] == [[0.5, None, "<!--", [["a", "b"]]]]


@pytest.mark.parametrize("count", [1, 4, 8])
def test_palette_gets_steadily_further_from_the_page(count: int) -> None:
    lightness = [
        tuple(float(color.removeprefix("oklch(").split()[0]) for color in pair)
        for pair in palette(count)
    ]
    assert len(lightness) == count
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in pairwise(lightness))


def test_numbers_as_people_read_them() -> None:
    assert [text.compact(v) for v in (0, 999, 1234, 999_960, 2.6e9)] == [
        "0", "999", "1.23 k", "1.00 M", "2.60 B",
    ]  # fmt: skip
    assert text.compact(2.5e12, "FLOP/s", billion="G") == "2.50 TFLOP/s"
    assert text.compact(12.34e9, "B", billion="G") == "12.3 GB"
    assert text.compact(nan) == "–"
    assert text.fixed(-0.0123, 3, sign=True) == "−0.012"
    assert text.fixed(0.0123, 3, sign=True) == "+0.012"
    assert text.percent(0.8914) == "89.1 %"
    times = (12.34, 59.97, 250, 3599.7, 3900, 86_399, 180_000)
    assert [text.duration(t) for t in times] == [
        "12.3 s", "1 min 00 s", "4 min 10 s", "1 h 00 min", "1 h 05 min", "1 d 0 h", "2 d 2 h",
    ]  # fmt: skip


def test_printable_shows_control_characters_and_says_what_it_cut() -> None:
    assert text.printable("a\x00\x1b\x7f\x85\u202eb\n\t", 100) == ("a␀␛␡\ufffd\ufffdb\n\t", 0)
    assert text.printable("abcdef", 4) == ("abcd", 2)
