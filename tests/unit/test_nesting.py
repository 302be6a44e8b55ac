from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, Submodel, mix_n_match

NESTING = Nesting.from_fractions(1024, ["1/8", 0.25, "0.5", 1])


@st.composite
def nestings(draw: st.DrawFn) -> Nesting:
    widths = draw(st.lists(st.integers(1, 500), min_size=1, max_size=9, unique=True))
    return Nesting.from_widths(sorted(widths))


@st.composite
def submodels(draw: st.DrawFn) -> Submodel:
    nesting = draw(nestings())
    granularity = st.integers(0, nesting.largest)
    return Submodel(nesting, tuple(draw(st.lists(granularity, min_size=1, max_size=12))))


def test_default_nesting_matches_paper() -> None:
    assert NESTING.widths == (128, 256, 512, 1024)
    assert NESTING.names == ("S", "M", "L", "XL")
    assert NESTING.rings == (128, 128, 256, 512)


@given(nestings())
def test_rings_add_up_to_every_width(nesting: Nesting) -> None:
    for i, width in enumerate(nesting.widths):
        assert sum(nesting.rings[: i + 1]) == width
    assert len(set(nesting.names)) == len(nesting)


@given(submodels())
def test_notation_matches_submodel_after_round_trip(submodel: Submodel) -> None:
    assert submodel.nesting.parse(str(submodel), len(submodel)) == submodel


def test_notation_is_short_and_in_layer_order() -> None:
    submodel = NESTING.parse("S:8,M:4,XL:4", 16)
    assert submodel.granularities == (0,) * 8 + (1,) * 4 + (3,) * 4
    assert submodel.widths == (128,) * 8 + (256,) * 4 + (1024,) * 4
    assert str(submodel) == "S:8,M:4,XL:4"
    assert str(NESTING.parse(" S , S, M:2", 4)) == "S:2,M:2"
    assert str(NESTING.parse("L:16", 16)) == "L"


@pytest.mark.parametrize(
    ("notation", "says"),
    [
        ("S:8,M:4", "covers 12 layers"),
        ("S:8,Q:8", "no granularity 'Q'"),
        ("S:0,M:16", "'S:0' needs a whole number"),
        ("S:-1,M:17", "'S:-1' needs a whole number"),
        ("S:x", "'S:x' needs a whole number"),
        ("S:²", "needs a whole number"),
        ("", "no granularity ''"),
        ("S:8,,M:8", "no granularity ''"),
        ("s", "no granularity 's'"),
    ],
)
def test_bad_notation_is_refused(notation: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        NESTING.parse(notation, 16)


@pytest.mark.parametrize(
    ("d_ff", "fractions", "says"),
    [
        (1000, ["1/3", 1], "not a whole number"),
        (1000, [0.5], "end with 1"),
        (1000, [0.5, 0.5, 1], "strictly increasing"),
        (1000, [0, 1], "above 0"),
        (1000, [-0.5, 1], "above 0"),
        (1000, ["1/0", 1], "not a number"),
        (1000, ["wide", 1], "not a number"),
        (1000, [], "end with 1"),
    ],
)
def test_bad_fractions_are_refused(d_ff: int, fractions: list[str | float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Nesting.from_fractions(d_ff, fractions)


@pytest.mark.parametrize("names", [["S"], ["S", "S"], ["S", "M:1"], ["S", ""], ["S", "1"]])
def test_bad_names_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="name"):
        Nesting.from_widths([4, 8], names)


def test_undealable_rings_are_refused_with_widths_that_work() -> None:
    nesting = Nesting.from_widths([3, 5, 8])
    nesting.check_dealable(1)
    with pytest.raises(UserError, match=r"nearest widths that do are \[4, 6, 8\]"):
        nesting.check_dealable(2)
    Nesting.from_widths([4, 6, 8]).check_dealable(2)


@given(nestings(), st.integers(1, 8), st.integers(1, 8))
def test_suggested_widths_are_dealable(nesting: Nesting, ranks: int, multiple: int) -> None:
    try:
        nesting.check_dealable(ranks, multiple)
    except UserError as error:
        suggested = str(error).split("[")[-1].split("]")[0]
        widths = [int(width) for width in suggested.split(",")]
        Nesting.from_widths(widths).check_dealable(ranks, multiple)


def test_truncated_nesting_keeps_the_smaller_granularities() -> None:
    assert NESTING.truncate(1) == Nesting((128, 256), ("S", "M"))


@given(nestings(), st.integers(1, 7))
def test_mix_n_match_matches_the_heuristic(nesting: Nesting, n_layers: int) -> None:
    found = list(mix_n_match(nesting, n_layers))
    assert len(set(found)) == len(found) == (len(nesting) - 1) * n_layers + 1
    assert {nesting.uniform(i, n_layers) for i in range(len(nesting))} <= set(found)
    for submodel in found:
        assert all(0 <= b - a <= 1 for a, b in pairwise(submodel.granularities))
        assert submodel.granularities[-1] - submodel.granularities[0] <= 1
    sizes = [sum(submodel.widths) for submodel in found]
    assert sizes == sorted(sizes)
