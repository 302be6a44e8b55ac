"""Neighbours against a plain ranking in fp64, FAISS against torch, ties and rounding among them."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matformer_dist.errors import UserError
from matformer_dist.evaluation import neighbours
from matformer_dist.evaluation.neighbours import GalleryIndex, choose_backend, normalised
from matformer_dist.submodels.retrieval_results import Backend

BACKENDS: tuple[Backend, ...] = ("torch", "faiss")


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> Backend:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    found: Backend = request.param
    return found


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return normalised(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), "XL")


def index(gallery: Tensor, backend: Backend | None = None) -> GalleryIndex:
    return GalleryIndex(gallery, torch.zeros(len(gallery), dtype=torch.long), backend)


def ranked(gallery: Tensor, query: Tensor, k: int, own: int | None = None) -> list[int]:
    """All of the gallery by similarity, then by index, one query, Python's own sort."""
    near = ((gallery.double() * query.double()).sum(dim=1) * 2**30).round().tolist()
    order = sorted(range(len(gallery)), key=lambda i: (-near[i], i))
    return [i for i in order if i != own][:k]


@pytest.mark.parametrize(("n", "d", "k"), [(7, 3, 7), (300, 8, 5), (300, 129, 1), (40, 1, 12)])
def test_neighbours_match_a_ranking_of_everything(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, n: int, d: int, k: int
) -> None:
    monkeypatch.setattr(neighbours, "_GALLERY_ROWS", 64)
    monkeypatch.setattr(neighbours, "_ROWS", 3)
    gallery, queries = drawn(n, d), drawn(10, d, seed=1)
    near, at = index(gallery, backend).search(queries, k)
    assert at.tolist() == [ranked(gallery, query, k) for query in queries]
    torch.testing.assert_close(near, (queries @ gallery.T).gather(1, at))


def test_a_gallery_image_does_not_find_itself_where_it_is_left_out(backend: Backend) -> None:
    gallery = drawn(50, 6)
    _, at = index(gallery, backend).search(gallery[10:20], 49, torch.arange(10, 20))
    assert at.tolist() == [ranked(gallery, gallery[i], 49, i) for i in range(10, 20)]


@pytest.mark.parametrize("copies", [2, 40, 500])
def test_equal_images_come_by_index(backend: Backend, copies: int) -> None:
    """More copies than there are candidates, at places where products are summed otherwise."""
    gallery = drawn(700, 33)
    places = torch.randperm(700, generator=torch.Generator().manual_seed(2))[:copies]
    gallery[places] = gallery[0].clone()
    query = normalised(gallery[:1] + 0.01, "XL")
    _, at = index(gallery, backend).search(query, 5)
    assert at[0].tolist() == ranked(gallery, query[0], 5)
    equal = sorted({0, *places.tolist()})
    assert at[0, : min(5, len(equal))].tolist() == equal[:5]


def test_collapsed_embeddings_find_the_first_images(backend: Backend) -> None:
    gallery = normalised(torch.full((900, 17), 0.3), "XL")
    _, at = index(gallery, backend).search(gallery[:4], 3, torch.arange(4))
    assert at.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    # of products with 16 queries, those at the gallery's end are summed in another order
    _, at = index(drawn(1, 129).repeat(701, 1), backend).search(drawn(16, 129, seed=1), 5)
    assert at.tolist() == 16 * [[0, 1, 2, 3, 4]]
    near, at = index(torch.zeros(30, 5), backend).search(drawn(2, 5), 2)
    assert at.tolist() == [[0, 1], [0, 1]] and near.abs().max() == 0


def test_what_fp32_cannot_tell_apart_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """A crowd whose similarities differ by less than fp32's products round by."""
    monkeypatch.setattr(neighbours, "_GALLERY_ROWS", 100)
    turns = torch.arange(400, dtype=torch.float64).flip(0) * 2e-8
    turn = torch.stack([0.6 + 0 * turns, 0.8 + 0 * turns, turns], dim=1)
    gallery = (
        turn.float()
    )  # unit length to 1e-10; further along the third axis, nearer to the query
    query = normalised(torch.tensor([[0.6, 0.8, 0.5]]), "XL")
    _, at = index(gallery, backend).search(query, 30)
    assert at[0].tolist() == ranked(gallery, query[0], 30)
    assert at[0, 0] < 3 and at[0, -1] > 27  # by the third axis, not by chance


def test_faiss_matches_torch() -> None:
    pytest.importorskip("faiss")
    gallery, queries = drawn(5000, 48), drawn(300, 48, seed=1)
    gallery[3000:3100] = gallery[:100]
    found = [index(gallery, backend).search(queries, 25) for backend in BACKENDS]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.itemsize)
        return made


def test_memory_does_not_grow_with_queries_times_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_GALLERY_ROWS", 128)
    monkeypatch.setattr(neighbours, "_ROWS", 60)
    monkeypatch.setattr(neighbours, "_VALUES", 1 << 12)
    monkeypatch.setattr(neighbours, "_PAIR_VALUES", 1 << 10)
    gallery = drawn(4000, 2)
    gallery[::2] = gallery[0].clone()  # for these, all of the gallery is looked through
    with Largest() as largest:
        index(gallery, "torch").search(gallery[:400:2], 10)
    assert 128 * 60 <= largest.numbers <= 4000 * 2  # the gallery itself is the largest


def test_embeddings_are_normalised() -> None:
    long = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(normalised(long, "XL"), expected)
    assert normalised(long.bfloat16(), "XL").dtype == torch.float32


def test_embeddings_that_are_not_finite_are_refused() -> None:
    broken = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [float("inf"), 0.0]])
    with pytest.raises(UserError, match=r"S:2,XL:2 gives 2 of 3 images .* not finite"):
        normalised(broken, "S:2,XL:2")


@pytest.mark.parametrize(("k", "own", "most"), [(0, False, 5), (6, False, 5), (5, True, 4)])
def test_more_neighbours_than_there_are_images_are_refused(k: int, own: bool, most: int) -> None:
    gallery = drawn(5, 2)
    excluded = torch.arange(5) if own else None
    other = "other " if own else ""
    with pytest.raises(UserError, match=f"{k} neighbours: k must be 1 to {most}, the {other}galle"):
        index(gallery, "torch").search(gallery, k, excluded)


def test_faiss_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("torch") == "torch"
    monkeypatch.setitem(sys.modules, "faiss", object())
    assert choose_backend(None) == choose_backend("faiss") == "faiss"
    imported = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == "faiss":
            raise ImportError
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    assert choose_backend(None) == "torch"
    assert index(drawn(3, 2)).backend == "torch"
    with pytest.raises(UserError, match="FAISS is not installed: pip install faiss-cpu"):
        choose_backend("faiss")
