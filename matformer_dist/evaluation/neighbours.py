"""Nearest neighbours by cosine similarity in a gallery of embeddings: exact, in bounded memory.

Legend: n images of the gallery, q queries, D dimensions, k neighbours, c candidates of each query.

FAISS or torch proposes c > k candidates by products in fp32. Their similarities are computed again
in fp64, in one way for both, and decide; of equal ones, the lower index comes first. A query whose
neighbours fp32's rounding may have kept out is compared with the whole gallery in fp64.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.errors import UserError
from matformer_dist.submodels.retrieval_results import Backend

_SPARE = 16  # candidates above k
_ROWS = 1024  # queries at once, at most
_GALLERY_ROWS = 1 << 14  # at once: 64 MiB of products
_VALUES = 1 << 22  # fp64 products with a whole gallery at once: 32 MiB
_PAIR_VALUES = 1 << 17  # fp64 numbers of pairs at once: 1 MiB, which stays in a cache
# Similarities are multiples of 2^-30, as exact as fp32 embeddings make them: fp64 sums differ in
# their last bits with their place in a product, and equal images must tie.
_GRID = 2.0**30


def normalised(embeddings: Tensor, of: str) -> Tensor:
    """Embeddings [n, D] of unit length, fp32; zero stays zero. UserError where not finite.

    of: what embedded, for the message.
    """
    found = F.normalize(embeddings.double(), dim=1, eps=1e-300)
    broken = int((~found.isfinite().all(dim=1)).sum())
    if broken:
        raise UserError(
            f"{of} gives {broken} of {len(found)} images embeddings that are not finite numbers; "
            "take a checkpoint from before its losses were not finite"
        )
    return found.float()


def similarities(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Products of rows of a [q, D] and of b [n, D], in pairs of indices [p], [p]: fp64 [p]."""
    size = max(1, _PAIR_VALUES // a.shape[1])
    parts = [
        (a[i].double() * b[j].double()).sum(dim=1)
        for i, j in zip(rows.split(size), columns.split(size), strict=True)
    ]
    return _on_grid(torch.cat(parts))


def _on_grid(similarities: Tensor) -> Tensor:
    return (similarities * _GRID).round() / _GRID


def choose_backend(wanted: Backend | None) -> Backend:
    """FAISS where it is installed and torch is not asked for. UserError where it is missing."""
    if wanted != "torch":
        try:
            import faiss  # noqa: F401
        except ImportError:
            if wanted == "faiss":
                raise UserError(
                    "FAISS is not installed: pip install faiss-cpu; or search with torch, which "
                    "finds the same, slower"
                ) from None
            return "torch"
        return "faiss"
    return "torch"


def check_neighbours(k: int, gallery: int, leave_one_out: bool) -> None:
    """UserError where a gallery of so many images has no k, or no k others, to find."""
    most = gallery - leave_one_out
    if not 1 <= k <= most:
        other = "other " if leave_one_out else ""
        raise UserError(f"{k} neighbours: k must be 1 to {most}, the {other}gallery images")


class GalleryIndex:
    """Embeddings [n, D], as `normalised` gives them, to look for neighbours in; labels [n].

    `backend` says what proposes them: FAISS's exact IndexFlatIP, which runs on the CPU and holds a
    copy, or torch, on the device of the embeddings; None: see `choose_backend`.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, backend: Backend | None = None) -> None:
        assert embeddings.dtype == torch.float32 and len(labels) == len(embeddings)
        self.backend: Backend = choose_backend(backend)
        self.embeddings = embeddings.cpu() if self.backend == "faiss" else embeddings
        self.labels = labels
        self._faiss: Any = None
        if self.backend == "faiss":
            import faiss

            self._faiss = faiss.IndexFlatIP(embeddings.shape[1])
            self._faiss.add(self.embeddings.numpy())

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(
        self, queries: Tensor, k: int, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of normalised queries [q, D] the k nearest, nearest first.

        (cosine similarities fp32 [q, k], indices in the gallery [q, k]), on the embeddings'
        device. excluded [q]: the image of the gallery that each query is itself, which is left out
        (leave-one-out: torch.arange(n) for the gallery's own embeddings). UserError where the
        gallery has no k others.
        """
        check_neighbours(k, len(self), excluded is not None)
        queries = queries.to(self.embeddings.device)
        excluded = None if excluded is None else excluded.to(queries.device)
        found = queries.new_empty(len(queries), k)
        at = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
        for rows in torch.arange(len(queries), device=queries.device).split(_ROWS):
            own = None if excluded is None else excluded[rows]
            found[rows], at[rows], sure = self._among_candidates(queries[rows], own, k)
            for left in rows[~sure].split(_VALUES // _GALLERY_ROWS):
                own = None if excluded is None else excluded[left]
                found[left], at[left] = self._among_all(queries[left], own, k)
        return found, at

    def _among_candidates(
        self, queries: Tensor, own: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Similarities and indices [q, k], and [q] whether they are certain."""
        c = min(len(self), k + _SPARE)
        proposed, at = self._propose(queries, c)
        at = at.sort(dim=1).values  # so that a stable sort leaves the lower index first
        rows = torch.arange(len(queries), device=at.device).repeat_interleave(c)
        exact = similarities(queries, self.embeddings, rows, at.flatten()).view(at.shape)
        exact, at = _best(exact, at, own, k)
        bound = proposed.min(dim=1).values.double() + _rounding(queries.shape[1])
        sure = (exact[:, -1] > bound) | (c == len(self))
        return exact.float(), at, sure

    def _among_all(self, queries: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Similarities and indices [q, k], from products with all of the gallery in fp64."""
        best = queries.new_empty(len(queries), 0, dtype=torch.float64)
        at = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for first in range(0, len(self), _GALLERY_ROWS):
            block = self.embeddings[first : first + _GALLERY_ROWS].double()
            exact = _on_grid(queries.double() @ block.T)
            there = torch.arange(first, first + len(block), device=at.device).expand(exact.shape)
            best, at = torch.cat([best, exact], dim=1), torch.cat([at, there], dim=1)
            best, at = _best(best, at, own, k)
        return best.float(), at

    def _propose(self, queries: Tensor, c: int) -> tuple[Tensor, Tensor]:
        """The c best by fp32 products, in any order: products and indices [q, c]."""
        if self._faiss is not None:
            products, at = self._faiss.search(queries.numpy(), c)
            return torch.from_numpy(products), torch.from_numpy(at)
        best = queries.new_empty(len(queries), 0)
        at = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for first in range(0, len(self), _GALLERY_ROWS):
            block = queries @ self.embeddings[first : first + _GALLERY_ROWS].T
            products, there = block.topk(min(c, block.shape[1]), dim=1)
            best, at = torch.cat([best, products], dim=1), torch.cat([at, first + there], dim=1)
            best, kept = best.topk(min(c, best.shape[1]), dim=1)
            at = at.gather(1, kept)
        return best, at


def _best(exact: Tensor, at: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k best (or all) of similarities at indices [q, c], the first of equal ones; without own
    [q]."""
    if own is not None:
        exact = exact.masked_fill(at == own[:, None], -inf)
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    return exact[:, :k], at.gather(1, order[:, :k])


def _rounding(d: int) -> float:
    """How far a product of unit vectors can be from the exact one: operands' and sums' rounding."""
    operands = 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
    return (d + 2) * 2.0**-24 + operands
