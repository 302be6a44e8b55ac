"""RUN/retrieval.json: galleries of embeddings, asked by submodels and by encoders trained apart.

Without torch: reports and commands read it. Shares are of queries, intervals hold 95%, by bootstrap
over queries. Distances are cosine distances.
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from matformer_dist.nesting import SubmodelKind
from matformer_dist.submodels.result_files import Entry, Interval, Number, read_result

RETRIEVAL = "retrieval.json"
NESTED, OWN = "nested", "own"
Backend: TypeAlias = Literal["faiss", "torch"]
MEASURED_BY_K = ("knn_accuracy", "accuracy_lost", "recall", "neighbour_agreement")  # of an entry
_CHANCE_BY_K = ("recall", "neighbour_agreement")


class Measure(Entry):
    """A number of all queries, and its interval."""

    value: Number
    interval: Interval = (nan, nan)


class RetrievalEntry(Entry):
    """One query encoder on one gallery.

    The reference is what the gallery's own encoder finds there with its own queries; of an own
    gallery, what XL finds in XL's.
    """

    encoder: str  # nested, or the name of a run that was trained apart
    submodel: str
    kind: SubmodelKind
    gallery: str  # own; XL, by the name it has in the run; or the name of a run trained apart
    query_flops: int  # forward of one image
    parameters: int
    knn_accuracy: dict[int, Measure]  # by k: share of right majority votes of the k nearest
    accuracy_lost: dict[int, Measure]  # knn_accuracy of XL in XL's gallery minus this one's, paired
    recall: dict[int, Measure]  # by k: share with at least one of its class among the k nearest
    neighbour_agreement: dict[int, Measure]  # by k: share of the k nearest that the reference has
    pearson: Measure  # correlation of the distances of query and gallery with the reference's
    spearman: Measure  # the same of their ranks
    # Of the same query image, embedded by this encoder and by the gallery's; None: they are one.
    own_image_similarity: Measure | None = None  # mean cosine
    own_image_found: Measure | None = None  # share where it is the nearest of all query images


class Chance(Entry):
    """What neighbours drawn at random would give, by the frequencies of the labels."""

    accuracy: Number  # of 1-NN
    majority: Number  # of the gallery's most frequent class for every query
    recall: dict[int, Number]  # by k
    neighbour_agreement: dict[int, Number]  # by k
    own_image_found: Number


class RetrievalMeasures(Entry):
    """All that is measured of a gallery and queries; see evaluation/retrieval.py."""

    largest: str  # what XL is called in this run
    gallery: int  # images
    queries: int  # images
    leave_one_out: bool  # the queries are the gallery, and none finds itself
    ks: list[int]  # numbers of neighbours, 1 among them
    backend: Backend  # what searched
    pairs: int  # of query and gallery image, whose distances are correlated
    chance: Chance
    notes: list[str]  # what there is to know beside the numbers
    entries: list[RetrievalEntry] = Field(min_length=1)  # the cheapest query first

    @model_validator(mode="after")
    def _has_every_k(self) -> RetrievalMeasures:
        if 1 not in self.ks:
            raise ValueError(f"ks {self.ks} must hold 1")
        by_k = [(f"entries.{i}", entry, MEASURED_BY_K) for i, entry in enumerate(self.entries)]
        for where, part, names in [*by_k, ("chance", self.chance, _CHANCE_BY_K)]:
            for name in names:
                if set(getattr(part, name)) != set(self.ks):
                    raise ValueError(f"{where}.{name} must have the keys of ks, {self.ks}")
        return self

    @property
    def reference(self) -> RetrievalEntry | None:
        """XL's queries in XL's gallery."""
        return next((one for one in self.on_largest if one.submodel == self.largest), None)

    def saved(self, entry: RetrievalEntry) -> float:
        """The share of XL's query FLOPs that it does not need; NaN where XL was not measured."""
        reference = self.reference
        return 1 - entry.query_flops / reference.query_flops if reference else nan

    @property
    def on_largest(self) -> list[RetrievalEntry]:
        """Submodels of this run that ask XL's gallery: adaptive retrieval."""
        found = (one for one in self.entries if one.encoder == NESTED)
        return [one for one in found if one.gallery == self.largest]


class RetrievalResult(RetrievalMeasures):
    """retrieval.json."""

    format: Literal[1] = 1
    step: int
    checkpoint_sha256: str  # of the manifest
    data: str  # which images, in words

    @classmethod
    def of(
        cls, measured: RetrievalMeasures, *, step: int, checkpoint_sha256: str, data: str
    ) -> RetrievalResult:
        return cls(**dict(measured), step=step, checkpoint_sha256=checkpoint_sha256, data=data)


def read_retrieval(run_dir: Path) -> RetrievalResult | None:
    """None where retrieval was not measured; UserError where the file is broken."""
    return read_result(
        run_dir / RETRIEVAL, RetrievalResult, "delete it and run `matformer retrieve` again"
    )
