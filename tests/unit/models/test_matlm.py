from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist.config import Sample
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.counting import count_parameters, forward_flops
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting, Segment
from matformer_dist.parallel.layers import Initializer

VOCAB = 37
NESTING = Nesting.from_widths([3, 5, 11, 16])
SHAPE: dict[str, Any] = {"d_model": 24, "n_layers": 3, "n_heads": 4, "d_ff": 16, "init_std": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped-query, tied": {"n_kv_heads": 2, "tied_embeddings": True},
    "wide heads": {"n_kv_heads": 2, "kv_channels": 24},
    "paper": {"ffn": "gelu", "norm": "layernorm", "tied_embeddings": True},
}


def matlm(**settings: Any) -> MatLM:
    model = LanguageModelConfig(**{**SHAPE, "max_seq_len": 32, **settings})
    return MatLM(model, [NESTING] * 3, VOCAB, Initializer(seed=1)).double()


def tokens(sequences: int, positions: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (sequences, positions + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def plan(segments: list[Segment], shared: bool, weights: list[float]) -> Pass:
    zeros = (0.0,) * len(segments)
    return Pass(tuple(segments), shared, tuple(weights), zeros, zeros)


def loss_and_gradients(
    model: MatLM, ids: tuple[Tensor, Tensor], run: Pass
) -> tuple[Tensor, list[Tensor]]:
    loss, _ = model(*ids, run)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("variant", VARIANTS)
def test_joint_pass_matches_separate_passes(variant: str) -> None:
    """Sharing rows, the first attention and every GEMM changes neither loss nor gradients."""
    model, ids = matlm(**VARIANTS[variant]), tokens(2)
    submodels = NESTING.uniforms(3)
    weights = [0.4, 0.3, 0.2, 0.1]
    joint = plan([Segment(s, 2) for s in submodels], True, weights)
    loss, gradients = loss_and_gradients(model, ids, joint)
    total, sums = torch.zeros((), dtype=torch.double), [torch.zeros_like(g) for g in gradients]
    for submodel, weight in zip(submodels, weights, strict=True):
        alone = plan([Segment(submodel, 2)], False, [weight])
        part, part_gradients = loss_and_gradients(model, ids, alone)
        total += part
        sums = [a + b for a, b in zip(sums, part_gradients, strict=True)]
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradients, sums)


def test_per_sequence_pass_matches_separate_passes() -> None:
    model, (ids, targets) = matlm(), tokens(6)
    segments = [Segment(s, n) for s, n in zip(NESTING.uniforms(3), (1, 0, 3, 2), strict=True)]
    loss, statistics = model(ids, targets, plan(segments, False, [1.0] * 4))
    start, total = 0, 0.0
    for segment in segments:
        rows = slice(start, start + segment.sequences)
        start += segment.sequences
        if segment.sequences:
            alone = plan([Segment(segment.submodel, segment.sequences)], False, [1.0])
            _, expected = model(ids[rows], targets[rows], alone)
            torch.testing.assert_close(statistics[rows], expected)
            total += float(expected[:, 0].sum())
    assert len(statistics) == start
    assert float(loss.detach()) == pytest.approx(total / targets.numel())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("notation", ["S", "M", "XL", "S:1,L:1,XL:1", "XL:1,S:2"])
def test_submodel_in_place_matches_a_model_of_that_width(variant: str, notation: str) -> None:
    model, (ids, _) = matlm(**VARIANTS[variant]), tokens(2)
    submodel = NESTING.parse(notation, 3)
    nestings = [NESTING.truncate(i) for i in submodel.granularities]
    small = MatLM(model.model, nestings, VOCAB, Initializer(None)).double()
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(whole[name][: len(parameter)])
    torch.testing.assert_close(small.logits(ids, submodel), model.logits(ids, submodel))
    count = count_parameters(model.model, VOCAB, submodel)
    assert sum(p.numel() for p in small.parameters()) == count.total


def test_statistics_match_logits() -> None:
    model, (ids, targets) = matlm(), tokens(3)
    submodels = [NESTING.parse(text, 3) for text in ("XL", "S", "XL:1,S:1,M:1")]
    with torch.no_grad():
        logs = [model.logits(ids, submodel).log_softmax(-1) for submodel in submodels]
        targets = targets.clone()
        targets[1:, ::2] = logs[1].argmax(-1)[1:, ::2]  # else hardly any is correct
        targets[0, :4] = -100
        _, statistics = model(ids, targets, Pass.evaluation(submodels, 3))
    valid = targets != -100
    for found, log in zip(statistics.split(3), logs, strict=True):
        nll = -log.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        agrees = log.argmax(-1) == logs[0].argmax(-1)
        kl = (logs[0].exp() * (logs[0] - log)).sum(-1)
        correct = log.argmax(-1) == targets
        expected = [(value * valid).sum(dim=1) for value in (nll, agrees, kl, valid, correct)]
        torch.testing.assert_close(found, torch.stack([e.double() for e in expected], dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_match_uncached(variant: str) -> None:
    model, (ids, _) = matlm(**VARIANTS[variant]), tokens(2, positions=12)
    submodel = NESTING.parse("S:1,XL:2", 3)
    with torch.no_grad():
        expected = model.logits(ids, submodel)
        cache = model.new_cache(2, 12)
        parts = [model.logits(part, submodel, cache) for part in ids.split([5, 1, 1, 3, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_a_token_sees_only_what_is_before_it() -> None:
    model, (ids, _) = matlm(), tokens(1)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCAB
    xl = NESTING.uniform(3, 3)
    before, after = model.logits(ids, xl), model.logits(changed, xl)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(
    variant: str, mode: Literal["selective", "full"]
) -> None:
    model, ids = matlm(**VARIANTS[variant]), tokens(2)
    joint = plan([Segment(s, 2) for s in NESTING.uniforms(3)], True, [0.25] * 4)
    loss, gradients = loss_and_gradients(model, ids, joint)
    model.activation_checkpointing = mode
    again, recomputed = loss_and_gradients(model, ids, joint)
    assert torch.equal(loss, again)
    torch.testing.assert_close(gradients, recomputed, rtol=0, atol=0)


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
