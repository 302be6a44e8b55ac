"""Adaptive retrieval: XL embeds a gallery once, and any submodel embeds the queries.

That works where submodels keep XL's metric space; encoders that were trained apart do not share
one, which the same measures show. Legend: b images of a batch, C channels, H height, W width, D
dimensions of an embedding, n images of the gallery, q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.evaluation.embedding_space import Answers, Space, Task, compare
from matformer_dist.evaluation.neighbour_measures import chances
from matformer_dist.evaluation.neighbours import choose_backend, normalised
from matformer_dist.nesting import Submodel, SubmodelKind
from matformer_dist.submodels.retrieval_results import (
    NESTED,
    OWN,
    Backend,
    RetrievalEntry,
    RetrievalMeasures,
)

KS = (1, 5, 10)


class Encoder(Protocol):
    """A universal model that embeds images."""

    def embed(self, submodel: Submodel, images: Tensor) -> Tensor:
        """images [b, C, H, W] -> embeddings [b, D], of any length and float dtype."""


class Batches(Protocol):
    """(images [b, C, H, W], labels [b], integers from 0 on); the same again each time."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class QueryEncoder:
    """A submodel that embeds, of the run or of one that was trained apart, and its costs."""

    encoder: Encoder
    submodel: Submodel
    kind: SubmodelKind
    query_flops: int  # forward of one image
    parameters: int
    name: str = NESTED  # or what the run that was trained apart is called

    def __str__(self) -> str:
        return str(self.submodel) if self.name == NESTED else self.name


@torch.no_grad()
def measure_retrieval(
    nested: Sequence[QueryEncoder],
    gallery: Batches,
    queries: Batches,
    *,
    independents: Sequence[QueryEncoder] = (),
    ks: Sequence[int] = KS,
    leave_one_out: bool = False,
    backend: Backend | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RetrievalMeasures:
    """All `nested` submodels, XL among them, ask XL's gallery; uniform ones their own, too.

    Encoders that were trained apart each ask their own gallery, XL's, and that of the costliest of
    them, where embeddings have as many dimensions. 1 is always among `ks`. leave_one_out: both are
    the same images in the same order, and none finds itself. In memory are all embeddings of the
    queries, and one gallery: it is read once for each encoder that embeds it. `progress` is called
    with batches embedded and in all. UserError for names that are taken, for no images, for fewer
    than the largest k, for embeddings that are not finite.
    """
    _check(ks, [one.name for one in independents], [str(one.submodel) for one in nested])
    largest = next(one for one in nested if _is_largest(one.submodel))
    own = [one for one in nested if one.submodel.is_uniform and one is not largest]
    costliest = max(independents, key=lambda one: one.query_flops, default=None)
    hosts, everyone = [*own, *independents], [*nested, *independents]
    passes = len(queries) + (1 + len(hosts)) * len(gallery)
    reader = _Reader(choose_backend(backend), progress, passes)
    asked, labels = reader.embed(everyone, queries)
    embedded, gallery_labels = reader.embed([largest], gallery)
    task = Task.of(labels, gallery_labels, sorted({1, *ks}), leave_one_out, reader.backend)
    found = _Found(task, asked)
    found.ask(largest, embedded.pop(largest), everyone)
    for host in hosts:
        others = [one for one in independents if one is not host and host is costliest]
        found.ask(host, reader.embed([host], gallery)[0][host], [host, *others])
    return RetrievalMeasures(
        largest=str(largest),
        gallery=len(gallery_labels),
        queries=len(labels),
        leave_one_out=leave_one_out,
        ks=task.ks,
        backend=task.backend,
        pairs=len(task.pairs),
        chance=chances(task.gallery, labels, task.ks, leave_one_out),
        notes=found.notes,
        entries=sorted(found.entries, key=lambda entry: entry.query_flops),
    )


class _Reader:
    """Embeds all images of some batches, and counts the batches."""

    def __init__(
        self, backend: Backend, progress: Callable[[int, int], None], batches: int
    ) -> None:
        self.backend, self._progress, self._batches = backend, progress, batches
        self._done = 0

    def embed(
        self, encoders: Sequence[QueryEncoder], batches: Batches
    ) -> tuple[dict[QueryEncoder, Tensor], Tensor]:
        """Normalised embeddings [images, D] of each encoder, where they are searched; labels."""
        parts: dict[QueryEncoder, list[Tensor]] = {one: [] for one in encoders}
        labels = []
        for images, of in batches:
            for one in encoders:
                embedded = normalised(one.encoder.embed(one.submodel, images), str(one))
                parts[one].append(embedded.cpu() if self.backend == "faiss" else embedded)
            labels.append(of.cpu())
            self._done += 1
            self._progress(self._done, self._batches)
        if not labels:
            raise UserError("there are no images to embed; queries and gallery need one each")
        return {one: torch.cat(embedded) for one, embedded in parts.items()}, torch.cat(labels)


class _Found:
    """What all query encoders find, gallery by gallery, XL's first."""

    def __init__(self, task: Task, asked: dict[QueryEncoder, Tensor]) -> None:
        self._task, self._asked = task, asked
        self._best: Answers | None = None  # XL's in XL's gallery
        self.entries: list[RetrievalEntry] = []
        self.notes: list[str] = []

    def ask(self, host: QueryEncoder, gallery: Tensor, askers: Sequence[QueryEncoder]) -> None:
        """Queries of `askers` to the embeddings [n, D] of `host`."""
        space = Space(self._task, gallery, self._asked[host])
        best = self._best = self._best or space.own
        for one in askers:
            if one is host:
                measures = compare(self._task, space.own, best, best)
                name = str(host) if space.own is best else OWN
                self.entries.append(_entry(one, name, measures))
                continue
            queries = self._asked[one]
            if queries.shape[1] != space.dimensions:
                self.notes.append(
                    f"{one} was not asked to search the gallery of {host}: its embeddings have "
                    f"{queries.shape[1]} dimensions, the gallery's {space.dimensions}."
                )
                continue
            measures = compare(self._task, space.ask(queries), space.own, best)
            measures |= space.own_image(queries)
            self.entries.append(_entry(one, str(host), measures))


def _entry(one: QueryEncoder, gallery: str, measures: dict[str, Any]) -> RetrievalEntry:
    return RetrievalEntry(
        encoder=one.name,
        submodel=str(one.submodel),
        kind=one.kind,
        gallery=gallery,
        query_flops=one.query_flops,
        parameters=one.parameters,
        **measures,
    )


def _is_largest(submodel: Submodel) -> bool:
    return set(submodel.granularities) == {submodel.nesting.largest}


def _check(ks: Sequence[int], names: Sequence[str], submodels: Sequence[str]) -> None:
    """UserError for numbers of neighbours below 1, and names that do not tell encoders apart."""
    if min(ks, default=1) < 1:
        raise UserError(f"numbers of neighbours {list(ks)} must be 1 or more, such as 1, 5, 10")
    taken = [NESTED, OWN, *submodels]
    for i, name in enumerate(names):
        if name in taken or name in names[:i]:
            raise UserError(
                f"an encoder that was trained apart cannot be called {name!r}: names must differ "
                f"from each other and from {', '.join(taken)}; rename its run"
            )
