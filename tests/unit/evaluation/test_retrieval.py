"""Adaptive retrieval of encoders that turn a circle of images, whose neighbours are seen by eye."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import cos, radians
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.evaluation.metric_space import Pairs, pearson, spearman
from matformer_dist.evaluation.retrieval import QueryEncoder, measure_retrieval
from matformer_dist.nesting import Nesting, Submodel
from matformer_dist.submodels.retrieval_results import RetrievalEntry, RetrievalMeasures

NESTING = Nesting.from_widths([1, 2], ["S", "XL"])
GALLERY = {0: 0, 10: 0, 40: 1, 50: 1, 90: 2, 100: 2}  # degrees on the circle, and class
QUERIES = {6: 0, 43: 1, 98: 2}  # no two are equally far from gallery images
TURN = {"XL": 0, "S": 20, "S:1,XL:1": 2}  # degrees that a submodel is off XL's space


class Circle:
    """An image is a number of degrees; it is embedded as a point of a circle, `sign` mirrors it."""

    def __init__(self, turn: dict[str, int], sign: int = 1, dimensions: int = 2) -> None:
        self.turn, self.sign, self.dimensions = turn, sign, dimensions
        self.embedded: Counter[str] = Counter()

    def embed(self, submodel: Submodel, images: Tensor) -> Tensor:
        self.embedded[str(submodel)] += len(images)
        angles = torch.deg2rad(self.sign * images.flatten() + self.turn[str(submodel)])
        points = torch.stack([angles.cos(), angles.sin()], dim=1)
        return 7 * torch.nn.functional.pad(points, (0, self.dimensions - 2))


class Images:
    """Batches of `size` images [b, 1, 1, 1]."""

    def __init__(self, images: dict[int, int], size: int = 2) -> None:
        self.images = torch.tensor([*images]).float().view(-1, 1, 1, 1).split(size)
        self.labels = torch.tensor([*images.values()]).split(size)

    def __iter__(self) -> Any:
        return zip(self.images, self.labels, strict=True)

    def __len__(self) -> int:
        return len(self.images)


def nested(encoder: Circle) -> list[QueryEncoder]:
    cost = {"S": 100, "S:1,XL:1": 150, "XL": 200}
    submodels = [NESTING.parse(name, 2) for name in cost]
    return [
        QueryEncoder(encoder, one, "uniform" if one.is_uniform else "heuristic", flops, flops // 2)
        for one, flops in zip(submodels, cost.values(), strict=True)
    ]


def apart(name: str, flops: int, turn: int, sign: int = 1, dimensions: int = 2) -> QueryEncoder:
    """An encoder of its own space."""
    alone = Nesting.from_widths([1]).uniform(0, 2)
    circle = Circle({"XL": turn}, sign, dimensions)
    return QueryEncoder(circle, alone, "uniform", flops, flops // 2, name)


def measured(**settings: Any) -> RetrievalMeasures:
    sets = {"gallery": Images(GALLERY), "queries": Images(QUERIES), "ks": (2,), "backend": "torch"}
    return measure_retrieval(nested(Circle(TURN)), **{**sets, **settings})  # type: ignore[arg-type]


def entry(found: RetrievalMeasures, encoder: str, submodel: str, gallery: str) -> RetrievalEntry:
    (one,) = (
        one
        for one in found.entries
        if (one.encoder, one.submodel, one.gallery) == (encoder, submodel, gallery)
    )
    return one


def values(one: RetrievalEntry) -> dict[str, Any]:
    """knn_accuracy@1: 0.5, pearson: 1.0, ..."""
    said: dict[str, Any] = {}
    for name, value in one.model_dump().items():
        for k, measure in value.items() if isinstance(value, dict) else ():
            if isinstance(k, int):
                said[f"{name}@{k}"] = measure["value"]
        if isinstance(value, dict) and "value" in value:
            said[name] = value["value"]
    return said


def test_submodels_on_the_gallery_of_xl_match_what_is_seen() -> None:
    found = measured()
    xl = values(entry(found, "nested", "XL", "XL"))
    assert xl == pytest.approx(
        {"knn_accuracy@1": 1, "knn_accuracy@2": 1, "accuracy_lost@1": 0, "accuracy_lost@2": 0,
         "recall@1": 1, "recall@2": 1, "neighbour_agreement@1": 1, "neighbour_agreement@2": 1,
         "pearson": 1, "spearman": 1}
    )  # fmt: skip
    # S sees its queries at 26, 63, 118: their two nearest are 40 10, 50 40 and 100 90
    small = values(entry(found, "nested", "S", "XL"))
    expected = {
        "knn_accuracy@1": 2 / 3, "knn_accuracy@2": 2 / 3, "accuracy_lost@1": 1 / 3,
        "accuracy_lost@2": 1 / 3, "recall@1": 2 / 3, "recall@2": 1, "neighbour_agreement@1": 1 / 3,
        "neighbour_agreement@2": 2.5 / 3, "own_image_similarity": cos(radians(20)),
        "own_image_found": 2 / 3,
    }  # fmt: skip
    assert {name: small[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert entry(found, "nested", "S", "XL").own_image_found is not None


def test_distance_correlations_match_the_cosines() -> None:
    found = measured()
    drawn = Pairs.draw(len(QUERIES), len(GALLERY), False).gallery
    assert found.pairs == drawn.numel()
    angles = torch.tensor([*GALLERY]).double()[drawn] - torch.tensor([*QUERIES])[:, None]
    away = torch.stack([torch.deg2rad(angles).cos(), torch.deg2rad(angles - 20).cos()])
    expected = float(torch.corrcoef(away.flatten(1))[0, 1])
    small = entry(found, "nested", "S", "XL")
    assert small.pearson.value == pytest.approx(expected, abs=1e-6)
    assert 0.5 < small.spearman.value < 0.99


def test_a_gallery_of_its_own_serves_a_submodel_as_xl() -> None:
    found = measured()
    own = values(entry(found, "nested", "S", "own"))
    assert own == pytest.approx(values(entry(found, "nested", "XL", "XL")))
    assert [one.gallery for one in found.entries if ":" in one.submodel] == ["XL"]  # uniform alone


def test_encoders_trained_apart_find_nothing_in_each_others_galleries() -> None:
    # mirrored, queries are at 194, 157, 102 of XL's circle: all are nearest to 100
    both = [apart("small", 90, 200, sign=-1), apart("big", 300, -30)]
    found = measured(independents=both)
    assert {(one.encoder, one.gallery) for one in found.entries if one.encoder != "nested"} == {
        ("small", "own"), ("small", "XL"), ("small", "big"), ("big", "own"), ("big", "XL"),
    }  # fmt: skip
    for name in ("small", "big"):
        own = values(entry(found, name, "XL", "own"))
        assert own == pytest.approx(values(entry(found, "nested", "XL", "XL")))
    across = values(entry(found, "small", "XL", "XL"))
    assert across["knn_accuracy@1"] == pytest.approx(1 / 3)
    assert across["neighbour_agreement@2"] == pytest.approx(1 / 3)
    assert across["spearman"] < 0
    # in the gallery of big, all of it 30 degrees back, 194 is nearest to 100 - 30 and so is 102
    assert values(entry(found, "small", "XL", "big"))["knn_accuracy@1"] == pytest.approx(1 / 3)
    assert [one.query_flops for one in found.entries] == sorted(
        one.query_flops for one in found.entries
    )
    assert found.notes == []


def test_across_encoders_the_reference_is_the_gallerys_own() -> None:
    # big sees 0 70 280 350 270 340 and queries 42 301 326: it finds 70 0, 280 270 and 340 350
    found = measured(independents=[apart("small", 90, 200, sign=-1), apart("big", 300, 0, sign=7)])
    assert values(entry(found, "big", "XL", "own"))["neighbour_agreement@2"] == pytest.approx(2 / 3)
    # small asks it at 194 157 102, and finds 270 280, 70 270 and 70 0
    across = entry(found, "small", "XL", "big")
    assert across.neighbour_agreement[2].value == pytest.approx(1 / 6)
    drawn = Pairs.draw(len(QUERIES), len(GALLERY), False).gallery
    gallery, queries = (torch.tensor([*some]).double() for some in (GALLERY, QUERIES))
    away, own = (
        1 - torch.deg2rad((7 * gallery)[drawn] - asked[:, None]).cos()
        for asked in (200 - queries, 7 * queries)
    )
    assert across.pearson.value == pytest.approx(pearson(away, own).value, abs=1e-6)
    assert across.spearman.value == pytest.approx(spearman(away, own).value, abs=1e-3)  # near ties


def test_galleries_of_other_dimensions_are_not_asked_and_that_is_said() -> None:
    found = measured(independents=[apart("small", 90, 5), apart("wide", 300, 0, dimensions=3)])
    asked = [(one.encoder, one.gallery) for one in found.entries if one.encoder != "nested"]
    assert sorted(asked) == [("small", "XL"), ("small", "own"), ("wide", "own")]
    said = "{} was not asked to search the gallery of {}: its embeddings have {} dimensions, the "
    said += "gallery's {}."
    assert found.notes == [said.format("wide", "XL", 3, 2), said.format("small", "wide", 2, 3)]


def test_galleries_are_embedded_once_and_progress_counts_batches() -> None:
    encoder, alone, done = Circle(TURN), apart("alone", 90, 5), []
    measure_retrieval(
        nested(encoder), Images(GALLERY), Images(QUERIES), independents=[alone], ks=(2,),
        progress=lambda *counts: done.append(counts),
    )  # fmt: skip
    assert encoder.embedded == {"XL": 3 + 6, "S": 3 + 6, "S:1,XL:1": 3}
    assert isinstance(alone.encoder, Circle) and alone.encoder.embedded == {"XL": 3 + 6}
    assert done == [(i + 1, 11) for i in range(11)]


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_results_depend_on_neither_batches_nor_backend(backend: str, size: int) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    other = measured(gallery=Images(GALLERY, size), queries=Images(QUERIES, size), backend=backend)
    assert other.backend == backend
    assert repr(other.model_copy(update={"backend": "torch"})) == repr(measured())


def test_queries_that_are_the_gallery_do_not_find_themselves() -> None:
    whole = Images(GALLERY)
    found = measured(gallery=whole, queries=whole, leave_one_out=True, ks=(1, 5))
    xl = values(entry(found, "nested", "XL", "XL"))
    assert (xl["knn_accuracy@1"], xl["recall@5"]) == (1, 1)  # 10 degrees to the other of the class
    assert found.chance.accuracy == pytest.approx(1 / 5)
    assert found.chance.neighbour_agreement == {1: 1 / 5, 5: 1}
    # S sees 20 30 60 70 110 120, may not find 0 10 40 50 90 100, and finds 10 40 50 90 100 90
    small = values(entry(found, "nested", "S", "XL"))
    assert small["knn_accuracy@1"] == pytest.approx(4 / 6)
    assert small["neighbour_agreement@1"] == pytest.approx(4 / 6)
    with pytest.raises(UserError, match="6 neighbours: k must be 1 to 5, the other"):
        measured(gallery=whole, queries=whole, leave_one_out=True, ks=(6,))
    with pytest.raises(UserError, match=r"3 queries and 6 gallery images are not the same"):
        measured(leave_one_out=True)


def test_what_is_measured_says_of_what() -> None:
    found = measured(ks=(3, 2, 2))
    assert (found.gallery, found.queries, found.ks) == (6, 3, [1, 2, 3])
    assert (found.largest, found.leave_one_out) == ("XL", False)
    assert found.chance.accuracy == pytest.approx(1 / 3)
    small = entry(found, "nested", "S", "XL")
    assert (small.kind, small.query_flops, small.parameters) == ("uniform", 100, 50)
    assert found.reference == entry(found, "nested", "XL", "XL")
    assert [one.submodel for one in found.on_largest] == ["S", "S:1,XL:1", "XL"]


@pytest.mark.parametrize("name", ["nested", "own", "S", "S:1,XL:1", "twice"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    both = [apart("twice", 1, 0), apart(name, 1, 0)]
    with pytest.raises(UserError, match=f"cannot be called '{name}': names must differ"):
        measured(independents=both)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[0, 3\] must be 1 or more"):
        measured(ks=(0, 3))
    with pytest.raises(UserError, match="7 neighbours: k must be 1 to 6"):
        measured(ks=(7,))
    for which in ("gallery", "queries"):
        with pytest.raises(UserError, match="no images to embed"):
            measured(**{which: []})
    diverged = apart("diverged", 1, 0)
    broken = replace(diverged, encoder=_Broken())
    with pytest.raises(UserError, match=r"diverged gives 2 of 2 images .* not finite"):
        measured(independents=[broken])


class _Broken:
    def embed(self, submodel: Submodel, images: Tensor) -> Tensor:
        assert str(submodel) == "XL"
        return torch.full((len(images), 2), torch.nan)
