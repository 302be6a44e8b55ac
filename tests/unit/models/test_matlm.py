from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist.config import Sample
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.counting import forward_flops
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting, Segment
from matformer_dist.parallel.layers import Initializer
from tests.unit.models.small_models import LANGUAGE, NESTING, VOCAB, matlm, plan


def some_tokens(sequences: int, positions: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (sequences, positions + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("variant", LANGUAGE)
def test_cached_logits_match_uncached(variant: str) -> None:
    model, (ids, _) = matlm(**LANGUAGE[variant]), some_tokens(2, positions=12)
    submodel = NESTING.parse("S:1,XL:2", 3)
    with torch.no_grad():
        expected = model.logits(ids, submodel)
        cache = model.new_cache(2, 12)
        parts = [model.logits(part, submodel, cache) for part in ids.split([5, 1, 1, 3, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_a_token_sees_only_what_is_before_it() -> None:
    model, (ids, _) = matlm(), some_tokens(1)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCAB
    xl = NESTING.uniform(3, 3)
    before, after = model.logits(ids, xl), model.logits(changed, xl)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


PAPER_VOCAB = 256_000


def paper_model(d_model: int) -> LanguageModelConfig:
    """The shapes of table T4."""
    return LanguageModelConfig(
        d_model=d_model, n_layers=16, n_heads=16, d_ff=4 * d_model, ffn="gelu", norm="layernorm",
        tied_embeddings=True, max_seq_len=1024,
    )  # fmt: skip


def paper_nesting(model: LanguageModelConfig) -> Nesting:
    return Nesting.from_fractions(model.d_ff, ["1/8", "1/4", "1/2", 1])


def paper_pass(model: LanguageModelConfig, counts: Sequence[int], shared: bool = False) -> Pass:
    """`counts` sequences for each granularity, XL first."""
    submodels = paper_nesting(model).uniforms(model.n_layers)
    segments = [Segment(s, n) for s, n in zip(submodels, counts, strict=True)]
    return plan(segments, shared, [0.25] * 4)


def counted_flops(
    model: LanguageModelConfig, run: Pass, sequences: int, positions: int
) -> tuple[int, int]:
    """FLOPs of forward and backward, body and head apart, counted on the meta device."""
    with torch.device("meta"):
        lm = MatLM(model, [paper_nesting(model)] * model.n_layers, PAPER_VOCAB, Initializer(None))
        ids = torch.zeros(sequences, positions, dtype=torch.long)
        # The counter does not know the in-place product by which the head's gradient accumulates;
        # the fused attentions' backward recomputes the scores, which is no model FLOP.
        in_place = {torch.ops.aten.addmm_: _product_flops}
        counter = FlopCounterMode(display=False, custom_mapping=in_place)
        with counter, sdpa_kernel(SDPBackend.MATH):
            lm(ids, ids, run)[0].backward()
    # The loss makes the head's gradients in its forward pass, so all of them are counted there.
    head = sum(counter.get_flop_counts()["MatLM.head"].values())
    return counter.get_total_flops() - head, head


def _product_flops(_total: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


@pytest.mark.parametrize("shared", [False, True], ids=["per_sequence", "joint"])
@pytest.mark.parametrize("d_model", [256, 1536])
def test_flop_counter_matches_the_formula(d_model: int, shared: bool) -> None:
    """In the body alone too, for the head is half of all FLOPs or more."""
    model = paper_model(d_model)
    run = paper_pass(model, (2, 2, 2, 2) if shared else (1, 2, 0, 3), shared)
    counted = counted_flops(model, run, 2 if shared else 6, 1024)
    expected = forward_flops(
        model, PAPER_VOCAB, run.segments, Sample(1024, 1024), shared_tokens=shared
    )
    assert counted == (3 * expected.body, 3 * expected.head)


def test_flop_counter_matches_the_papers_ratios() -> None:
    """Sec. E.1: training all four granularities costs 2.58 times training XL.

    That is 4 times the attention's projections, a third of XL's body, and 1.875 times the FFN, two
    thirds. The paper leaves out the scores: at 4 positions they are a thousandth.
    """
    model = paper_model(1536)

    def to_xl(counts: Sequence[int], shared: bool = False) -> float:
        """FLOPs of the body, in those of one sequence through XL alone."""
        sequences = max(counts) if shared else sum(counts)
        one = counted_flops(model, paper_pass(model, (1, 0, 0, 0)), 1, 4)[0]
        return counted_flops(model, paper_pass(model, counts, shared), sequences, 4)[0] / one

    close = partial(pytest.approx, rel=2e-3)
    assert to_xl((1, 1, 1, 1)) == close(2.583)  # per_sequence, dealt evenly to 4 sequences
    assert to_xl((1, 2, 4, 8)) == close((15 * 1 + 4 * 2) / 3)
    # Joint on one sequence: what the granularities share runs once, the first layer's attention.
    assert to_xl((1, 1, 1, 1), shared=True) == close(2.583 - 3 / 16 / 3)
