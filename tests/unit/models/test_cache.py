"""Passes over a cache whose rows differ in length, against passes without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.models.cache import Span
from matformer_dist.models.matlm import MatLM
from matformer_dist.models.rotation import Rotation
from matformer_dist.nesting import Nesting, Segment
from matformer_dist.parallel.layers import Initializer

VOCAB = 37
NESTING = Nesting.from_widths([3, 5, 11, 16])
XL = NESTING.uniform(3, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped-query": {"n_kv_heads": 2},
    "paper": {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True},
}


def matlm(**settings: Any) -> MatLM:
    model = LanguageModelConfig(
        d_model=24, n_layers=2, n_heads=4, d_ff=16, init_std=0.3, max_seq_len=32, **settings
    )
    return MatLM(model, [NESTING] * 2, VOCAB, Initializer(seed=1)).double()


def ids(rows: int, positions: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, positions), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_ragged_passes_match_whole_texts(variant: str) -> None:
    """Padded prompts, then passes of 1 and 3 tokens from three different lengths on."""
    model, text = matlm(**VARIANTS[variant]), ids(3, 16)
    expected = model.logits(text, XL)
    cache = model.new_cache(3, 16)
    lengths = [7, 2, 5]
    first = model.logits(text[:, :7], XL, cache)  # what lies behind a prompt is another text's
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row, :length], expected[row, :length])
    cache.cut(lengths)
    for s in (1, 3, 1):
        new = [text[row, n : n + s] for row, n in enumerate(cache.lengths)]
        found = model.logits(torch.stack(new), XL, cache)
        for row, end in enumerate(cache.lengths):
            torch.testing.assert_close(found[row], expected[row, end - s : end])


@torch.no_grad()
def test_tokens_taken_back_leave_no_trace() -> None:
    """Rejected ones of a draft, for instance, at another granularity."""
    model, text = matlm(), ids(2, 12)
    expected = model.logits(text, XL)
    cache = model.new_cache(2, 12)
    model.logits(text[:, :6], XL, cache)
    model.logits(ids(4, 4)[2:], NESTING.uniform(0, 2), cache)
    cache.cut([6, 4])
    new = torch.stack([text[0, 6:8], text[1, 4:6]])
    found = model.logits(new, XL, cache)
    torch.testing.assert_close(found[0], expected[0, 6:8])
    torch.testing.assert_close(found[1], expected[1, 4:6])


@torch.no_grad()
def test_rows_leave_and_change_places() -> None:
    model, text = matlm(), ids(3, 9)
    expected = model.logits(text, XL)
    cache = model.new_cache(3, 9)
    model.logits(text[:, :8], XL, cache)
    cache.cut([8, 3, 6])
    cache.keep([2, 0])
    assert cache.lengths == [6, 8]
    found = model.logits(torch.stack([text[2, 6:7], text[0, 8:9]]), XL, cache)
    torch.testing.assert_close(found, torch.stack([expected[2, 6:7], expected[0, 8:9]]))


@torch.no_grad()
def test_segments_read_the_cache_that_another_submodel_wrote() -> None:
    """The shared cache of speculative decoding."""
    model, text = matlm(), ids(2, 8)
    small = NESTING.parse("S,M", 2)
    cache = model.new_cache(2, 8)
    model.logits(text[:, :5], XL, cache)
    both = model.hidden(text[:, 5:], [Segment(XL, 1), Segment(small, 1)], cache=cache)
    alone = model.new_cache(1, 8)
    model.logits(text[1:, :5], XL, alone)
    torch.testing.assert_close(
        both[3:], model.hidden(text[1:, 5:], [Segment(small, 1)], cache=alone)
    )


def test_masks_are_made_only_where_sdpa_has_none() -> None:
    def of(lengths: list[int], s: int) -> Span:
        return Span.behind(lengths, s, torch.device("cpu"))

    assert of([0, 0], 5).mask is None and of([0, 0], 5).is_causal
    assert of([4, 4], 1).mask is None and not of([4, 4], 1).is_causal
    equal, ragged = of([4, 4], 2), of([1, 3], 2)
    assert equal.mask is not None and ragged.mask is not None
    assert equal.mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert ragged.mask[:, 0].sum(-1).tolist() == [[2, 3], [4, 5]]
    assert ragged.positions.tolist() == [[1, 2], [3, 4]] and ragged.end == 5


def test_rotations_of_rows_are_those_of_their_positions() -> None:
    model = matlm().model
    every = Rotation.of(torch.arange(9), model)
    positions = torch.tensor([[2, 3], [7, 8]])
    x = torch.randn(2, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    for rotation in (Rotation.of(positions, model), every.at(positions)):
        assert rotation.positions == 2
        for row in range(2):
            alone = Rotation.of(positions[row], model).turn(x[row : row + 1])
            assert torch.equal(rotation.turn(x)[row : row + 1], alone)
