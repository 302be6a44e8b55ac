"""Speculative decoding: exact for greedy, the verifier's distribution for samples, all edges."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any, Literal

import pytest
import torch

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.errors import UserError
from matformer_dist.inference import speculative
from matformer_dist.inference.generation import Sampling, generate
from matformer_dist.inference.speculative import Drafting, DraftLength, Statistics
from matformer_dist.models.cache import KeyValueCache
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from tests.unit.inference.test_batches import PROMPTS, prompts_of
from tests.unit.submodels.synthetic_run import NESTING, model_config, random_model

GREEDY = Sampling(temperature=0)
S, M, L, XL = (NESTING.uniform(i, 3) for i in range(4))
MIX = NESTING.parse("S:1,M:1,XL:1", 3)
Cache = Literal["own", "shared"]
CACHES: list[Cache] = ["own", "shared"]


def agreeing_model(max_seq_len: int = 48, **changes: Any) -> MatLM:
    """Neurons beyond S matter little, as training has it, so that drafts are often right."""
    lm = random_model(model_config(max_seq_len=max_seq_len, **changes))
    with torch.no_grad():
        for layer in lm.layers:
            layer.ffn.w_out[NESTING.widths[0] :] *= 0.2  # type: ignore[operator,union-attr,index]
    return lm


@pytest.fixture
def cheap_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if FFNs were all of a model, so that "auto" drafts more than one token, and varies."""
    monkeypatch.setattr(speculative, "_weights_read", lambda _, submodel: sum(submodel.widths))


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("tokens", [1, 4, "auto"])
@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"ffn": "gelu", "norm": "layernorm"}])
def test_greedy_output_matches_the_verifiers_own(
    cache: Cache, tokens: Any, changes: dict[str, Any]
) -> None:
    """Ragged prompts, ragged acceptance, up to the last token of the context."""
    lm = agreeing_model(**changes)
    for draft in (S, MIX):
        seen = Statistics()
        found = generate(
            lm, XL, PROMPTS, max_new_tokens=28, sampling=GREEDY,
            drafting=Drafting(draft, tokens, cache), statistics=seen,
        )  # fmt: skip
        assert found == generate(lm, XL, PROMPTS, max_new_tokens=28, sampling=GREEDY)
        assert 0.1 < seen.acceptance < 0.95, "both verdicts are met"
        assert seen.tokens_per_verify > 1
        assert seen.verified == sum(map(len, found)) - len(found)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("tokens", [7, 1000, "auto"])
def test_more_drafts_than_room_match_the_verifiers_own(cache: Cache, tokens: Any) -> None:
    """64 rows that end at different times, to the last place of the context."""
    lm = agreeing_model()
    prompts = prompts_of([1 + i % 45 for i in range(64)])
    for new in (1, 2, 3):
        options: dict[str, Any] = {"max_new_tokens": new, "sampling": GREEDY, "eod": 7}
        plain = generate(lm, XL, prompts, **options)
        assert plain == generate(lm, XL, prompts, drafting=Drafting(S, tokens, cache), **options)


@pytest.mark.parametrize("cache", CACHES)
def test_verifiers_may_differ_in_a_batch(cache: Cache) -> None:
    lm = agreeing_model()
    verifiers = [XL, MIX, L, XL, M, XL, L, MIX]
    drafting = Drafting(S, 3, cache)
    options: dict[str, Any] = {"max_new_tokens": 25, "sampling": GREEDY}
    found = generate(lm, verifiers, PROMPTS, drafting=drafting, **options)
    assert found == generate(lm, verifiers, PROMPTS, **options)


@pytest.mark.parametrize("cache", CACHES)
def test_documents_end_within_accepted_tokens(cache: Cache) -> None:
    """At each of the places of a round, in turn."""
    lm = agreeing_model()
    (plain,) = generate(lm, XL, [PROMPTS[0]], max_new_tokens=20, sampling=GREEDY)
    for eod in plain:
        seen = Statistics()
        (found,) = generate(
            lm, XL, [PROMPTS[0]], max_new_tokens=20, sampling=GREEDY, eod=eod,
            drafting=Drafting(S, 4, cache), statistics=seen,
        )  # fmt: skip
        assert found == plain[: plain.index(eod)]
        assert seen.verified == len(found)  # the end counts, the first token does not
        itself = Statistics()
        generate(
            lm, XL, [PROMPTS[0]], max_new_tokens=20, sampling=GREEDY, eod=eod,
            drafting=Drafting(XL, 4, cache), statistics=itself,
        )  # fmt: skip
        # Of a round's five tokens the last is the verifier's; what is behind the end is no draft.
        whole, rest = divmod(len(found), 5)
        assert itself.drafted == itself.accepted == 4 * whole + min(rest, 4)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=40, top_p=0.9)])
@pytest.mark.parametrize("new", [1, 2, 5, 6, 11])
def test_a_verifier_accepts_its_own_drafts(cache: Cache, sampling: Sampling, new: int) -> None:
    """All of them, at whatever place the text ends."""
    lm = agreeing_model()
    seen = Statistics()
    options: dict[str, Any] = {"max_new_tokens": new, "sampling": sampling, "statistics": seen}
    found = generate(lm, XL, PROMPTS[:3], drafting=Drafting(XL, 4, cache), **options)
    assert [len(row) for row in found] == [new] * 3
    assert seen.accepted == seen.drafted == 3 * ((new - 1) // 5 * 4 + max(0, (new - 1) % 5 - 1))
    assert seen.verifies == 3 * math.ceil((new - 1) / 5)


@pytest.mark.parametrize("cache", CACHES)
def test_sampled_tokens_do_not_hang_on_the_batch(cache: Cache) -> None:
    lm = agreeing_model()
    options: dict[str, Any] = {"max_new_tokens": 20, "sampling": Sampling(0.9), "seed": 5}
    together = generate(lm, XL, PROMPTS, drafting=Drafting(M, 3, cache), **options)
    for i in (1, 4, 7):
        batch = [*[[1]] * i, PROMPTS[i]]
        assert generate(lm, XL, batch, drafting=Drafting(M, 3, cache), **options)[i] == together[i]


VOCAB = 5
TINY = Nesting.from_widths([2, 8])
TINY_XL, TINY_S = TINY.uniform(1, 2), TINY.uniform(0, 2)
DRAWS = 10_000


def tiny_model() -> MatLM:
    """Its S is often right, and often wrong."""
    config = LanguageModelConfig(
        d_model=8, n_layers=2, n_heads=2, d_ff=8, max_seq_len=16, init_std=0.5
    )
    return MatLM(config, [TINY] * 2, VOCAB, Initializer(seed=1)).eval()


@torch.no_grad()
def exact_distribution(
    lm: MatLM, prompt: list[int], n: int, sampling: Sampling
) -> dict[Any, float]:
    """Of the first n tokens by XL, every sequence by itself."""
    sequences = list(itertools.product(range(VOCAB), repeat=n))
    logits = lm.logits(torch.tensor([[*prompt, *tokens] for tokens in sequences]), TINY_XL)
    shares = sampling.probabilities(logits[:, len(prompt) - 1 : -1])
    chosen = shares.gather(-1, torch.tensor(sequences).unsqueeze(-1)).squeeze(-1)
    return dict(zip(sequences, chosen.double().prod(dim=1).tolist(), strict=True))


def chi_square_excess(counts: Counter[Any], expected: dict[Any, float], draws: int) -> float:
    """(chi-square - its mean) / its standard deviation; sequences that are rare are one cell."""
    cells = [(counts[key], draws * share) for key, share in expected.items()]
    common = [cell for cell in cells if cell[1] >= 5]
    rare = [cell for cell in cells if cell[1] < 5]
    common.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    chi_square = sum((c - e) ** 2 / e for c, e in common if e > 0)
    freedom = sum(e > 0 for _, e in common) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=4, top_p=0.9)])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("tokens", [1, 2, "auto"])
def test_samples_follow_the_verifiers_distribution(
    sampling: Sampling, cache: Cache, tokens: Any
) -> None:
    """Chi-square of the first four tokens of 10,000 prompts, each with draws of its own.

    Its mean is the degrees of freedom f, its variance 2 f; f is about 80 to 310, where it is near
    normal: 5 deviations above are met about once in a million. Drawing from p in place of the
    residual is seen at 29 and more, a verdict without q at 60, the draft's uniform for the verdict
    at 9.
    """
    lm, prompt = tiny_model(), [3, 1]
    seen = Statistics()
    rows = generate(
        lm, TINY_XL, [prompt] * DRAWS, max_new_tokens=4, sampling=sampling, seed=11,
        drafting=Drafting(TINY_S, tokens, cache), statistics=seen,
    )  # fmt: skip
    assert 0.3 < seen.acceptance < 0.9
    expected = exact_distribution(lm, prompt, 4, sampling)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    counts = Counter(map(tuple, rows))
    assert all(expected[key] > 0 for key in counts)
    assert chi_square_excess(counts, expected, DRAWS) < 5


def test_the_drafts_own_distribution_is_told_apart() -> None:
    """What the test above would say of text that S had sampled."""
    lm, prompt = tiny_model(), [3, 1]
    rows = generate(lm, TINY_S, [prompt] * DRAWS, max_new_tokens=4, sampling=Sampling(), seed=11)
    expected = exact_distribution(lm, prompt, 4, Sampling())
    assert chi_square_excess(Counter(map(tuple, rows)), expected, DRAWS) > 40


def test_draft_length_follows_the_acceptance_seen() -> None:
    lm = agreeing_model()
    length = DraftLength(lm, Drafting(S, "auto"), [XL])

    def best(a: float) -> int:
        """By the closed formula."""
        ratios = {k: (1 - a ** (k + 1)) / (1 - a) / (1 + k * length.cost) for k in range(1, 17)}
        return max(ratios, key=ratios.__getitem__)

    weights = [sum(p.numel() for name, p in lm.named_parameters() if name != "embedding.weight")]
    narrow = sum(p.numel() for name, p in lm.named_parameters() if ".ffn.w" in name)
    weights.append(weights[0] - narrow * 7 // 8)
    assert length.cost == pytest.approx(weights[1] / weights[0])
    length.cost = 0.1  # a model whose FFNs weigh more
    assert length.choose() == best(0.5)
    for _ in range(100):
        length.saw(3, 4)
    assert length.choose() == best(0.75) > best(0.5)
    for _ in range(100):
        length.saw(4, 4)
    assert length.choose() == 16
    for _ in range(300):
        length.saw(0, 1)
    assert length.choose() == 1
    assert DraftLength(lm, Drafting(S, 7), [XL]).choose() == 7


def test_what_cannot_draft_is_named() -> None:
    lm = random_model(model_config())
    with pytest.raises(UserError, match="submodel L cannot draft for S:1,M:1,XL:1: it is wider"):
        generate(lm, MIX, [[1]], max_new_tokens=2, sampling=GREEDY, drafting=Drafting(L))
    with pytest.raises(UserError, match="draft tokens 0 must be a number from 1 on, or auto"):
        Drafting(S, 0)
    with pytest.raises(UserError, match="draft tokens 'some'"):
        Drafting(S, "some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cache 'both' must be own or shared"):
        Drafting(S, 4, "both")  # type: ignore[arg-type]


def test_a_draft_has_a_cache_of_its_own_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_model(model_config())
    made: list[KeyValueCache] = []
    new_cache = lm.new_cache

    def noted(sequences: int, capacity: int) -> KeyValueCache:
        made.append(new_cache(sequences, capacity))
        return made[-1]

    monkeypatch.setattr(lm, "new_cache", noted)
    for cache, caches in (("shared", 1), ("own", 2)):
        made.clear()
        drafting = Drafting(S, 2, cache)  # type: ignore[arg-type]
        generate(lm, XL, [[1, 2]], max_new_tokens=4, sampling=GREEDY, drafting=drafting)
        assert len(made) == caches
