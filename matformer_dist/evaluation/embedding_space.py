"""A gallery in the space of one encoder's embeddings, and what queries of any encoder find there.

Legend: q queries, n images of the gallery, D dimensions, K the largest of ks, p gallery images that
are drawn for each query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.evaluation.metric_space import Pairs, pearson, spearman
from matformer_dist.evaluation.neighbour_measures import described, knn_right, overlap, recalled
from matformer_dist.evaluation.neighbours import GalleryIndex, similarities
from matformer_dist.submodels.retrieval_results import MEASURED_BY_K, Backend


@dataclass(frozen=True)
class Task:
    """What does not depend on encoders: labels of the queries [q] and the gallery [n], on the CPU.

    UserError where leave_one_out is asked for and the labels are not the same.
    """

    queries: Tensor
    gallery: Tensor
    ks: list[int]  # ascending
    leave_one_out: bool
    backend: Backend
    pairs: Pairs

    @classmethod
    def of(
        cls, queries: Tensor, gallery: Tensor, ks: list[int], leave: bool, backend: Backend
    ) -> Task:
        if leave and not torch.equal(queries, gallery):
            raise UserError(
                f"{len(queries)} queries and {len(gallery)} gallery images are not the same images "
                "in the same order, so none can be left out of its own search; name one set, or "
                "search without leaving one out"
            )
        if leave and len(gallery) < 2:
            raise UserError("one image has no other to find; leaving one out needs two or more")
        pairs = Pairs.draw(len(queries), len(gallery), leave)
        return cls(queries, gallery, ks, leave, backend, pairs)


@dataclass(frozen=True)
class Answers:
    """What one encoder's queries found, on the CPU."""

    indices: Tensor  # in the gallery, nearest first [q, K]
    distances: Tensor  # of the drawn pairs, fp64 [q, p]


class Space:
    """gallery [n, D] and queries [q, D], both of the gallery's own encoder, normalised."""

    def __init__(self, task: Task, gallery: Tensor, queries: Tensor) -> None:
        self._task, self.queries = task, queries
        self._index = GalleryIndex(gallery, task.gallery, task.backend)
        self._images = GalleryIndex(queries, task.queries, task.backend)
        self.own = self.ask(queries)

    @property
    def dimensions(self) -> int:
        return self.queries.shape[1]

    def ask(self, queries: Tensor) -> Answers:
        """Of normalised queries [q, D]."""
        own = torch.arange(len(queries)) if self._task.leave_one_out else None
        _, indices = self._index.search(queries, max(self._task.ks), own)
        distances = self._task.pairs.distances(queries, self._index.embeddings)
        return Answers(indices.cpu(), distances)

    def own_image(self, queries: Tensor) -> dict[str, Any]:
        """Of query images as embedded by another encoder, normalised [q, D], and by this space's:
        are they alike, and nearer to each other than to other query images?"""
        each = torch.arange(len(queries), device=queries.device)
        _, nearest = self._images.search(queries, 1)
        return described(
            {
                "own_image_similarity": similarities(queries, self.queries, each, each).cpu(),
                "own_image_found": (nearest[:, 0].cpu() == each.cpu()).double(),
            }
        )


def compare(task: Task, answers: Answers, reference: Answers, best: Answers) -> dict[str, Any]:
    """Measures of RetrievalEntry by name; `best`: XL's in XL's gallery, the one to lose against."""
    found = task.gallery[answers.indices]
    columns: dict[tuple[str, int], Tensor] = {}
    for k in task.ks:
        right = knn_right(found, task.queries, k)
        columns["knn_accuracy", k] = right
        columns["accuracy_lost", k] = knn_right(task.gallery[best.indices], task.queries, k) - right
        columns["recall", k] = recalled(found, task.queries, k)
        columns["neighbour_agreement", k] = overlap(answers.indices, reference.indices, k)
    means = described(columns)
    return {
        **{name: {k: means[name, k] for k in task.ks} for name in MEASURED_BY_K},
        "pearson": pearson(answers.distances, reference.distances),
        "spearman": spearman(answers.distances, reference.distances),
    }
