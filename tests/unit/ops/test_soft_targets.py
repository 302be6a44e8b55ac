"""Cross-entropy to soft targets against torch's, alone and beside the fused loss.

The definition makes whole logits, and torch's F.cross_entropy to probabilities of them. Ranks are
threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matformer_dist.ops.soft_targets import soft_target_correction
from matformer_dist.ops.vocab_shard import VocabShard
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import (
    IGNORED,
    PROBLEMS,
    SCALE,
    Problem,
    of_every_kind,
    tolerances,
)
from tests.unit.ops.test_loss_vocab_shards import Gather, Ranks, cut

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Mix:
    """What the targets are, and whether `others` are given."""

    share: float = 1.0
    smoothing: float = 0.0
    mixes: bool = True

    def others(self, labels: Tensor, vocab: int) -> Tensor | None:
        """Another permutation of the vocabulary; some labels are mixed with themselves."""
        return (3 * labels.clamp(min=0) + 1) % vocab if self.mixes else None

    def probabilities(self, labels: Tensor, vocab: int) -> Tensor:
        """q [n, V] in fp64; anything at ignored labels."""
        labels, others = labels.clamp(min=0), self.others(labels, vocab)
        hard = self.share * F.one_hot(labels, vocab).double()
        if others is not None:
            hard = hard + (1 - self.share) * F.one_hot(others, vocab).double()
        return (1 - self.smoothing) * hard + self.smoothing / vocab

    def correct(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab: int,
        shard: VocabShard | None = None,
    ) -> Tensor:
        """The operator."""
        others = self.others(labels, vocab)
        return soft_target_correction(
            hidden, weight, labels, others, share=self.share, smoothing=self.smoothing,
            vocab_size=vocab, vocab=shard,
        )  # fmt: skip

    def define(self, hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
        """The definition, of a label a row: GEMM in the operands' dtype, losses fp32 or better."""
        logits = hidden @ weight[:vocab].t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        q = self.probabilities(labels, vocab).to(logits.dtype)
        hard = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        soft = F.cross_entropy(logits, q, reduction="none")
        return torch.where(labels == IGNORED, 0, soft - hard)


MIXES = {
    "hard": Mix(),
    "smoothing": Mix(smoothing=0.1, mixes=False),
    "uniform": Mix(smoothing=1.0, mixes=False),
    "mixup": Mix(share=0.7),
    "the other alone": Mix(share=0.0),
    "both": Mix(share=0.3, smoothing=0.1),
}
every_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())


def operands(
    labels: int, groups: int, vocab: int, dtype: torch.dtype = torch.float64, d_model: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight, which need gradients, and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(groups * labels, d_model, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, d_model, generator=generator, dtype=torch.float64)
    y = torch.randint(vocab, (labels,), generator=generator)
    y[2::5] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), y


def gradients(correction: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(correction.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(
        correction, inputs, upstream.to(correction.dtype), materialize_grads=True
    )


@pytest.mark.parametrize(("labels", "groups"), [(13, 1), (13, 4), (1, 3), (0, 0)])
@every_mix
def test_correction_and_gradients_match_cross_entropy(mix: Mix, labels: int, groups: int) -> None:
    hidden, weight, y = operands(labels, groups, 11)
    correction = mix.correct(hidden, weight, y, 11)
    expected = mix.define(hidden, weight, y.repeat(groups), 11)
    torch.testing.assert_close(correction, expected)
    torch.testing.assert_close(
        gradients(correction, hidden, weight), gradients(expected, hidden, weight)
    )
    assert (correction[y.repeat(groups) == IGNORED] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_smoothing_matches_torchs_label_smoothing(smoothing: float) -> None:
    hidden, weight, y = operands(20, 1, 9)
    logits = hidden @ weight.t()
    hard, expected = (
        F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORED, label_smoothing=by)
        for by in (0.0, smoothing)
    )
    found = soft_target_correction(hidden, weight, y, smoothing=smoothing, vocab_size=9)
    torch.testing.assert_close(hard + found, expected)


@every_mix
def test_gradients_match_finite_differences(mix: Mix) -> None:
    hidden, weight, y = operands(3, 2, 4, d_model=2)
    assert torch.autograd.gradcheck(lambda h, w: mix.correct(h, w, y, 4), (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["smoothing", "mixup", "both"])
def test_low_precision_is_as_exact_as_plain(name: str, dtype: torch.dtype) -> None:
    mix = MIXES[name]
    hidden, weight, y = operands(300, 4, 50, dtype, d_model=48)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    results = []
    for correction, of in (
        (mix.correct(hidden, weight, y, 50), (hidden, weight)),
        (mix.define(hidden, weight, y.repeat(4), 50), (hidden, weight)),
        (mix.define(wide[0], wide[1], y.repeat(4), 50), wide),
    ):
        results.append((correction.detach(), *gradients(correction, *of)))
    for what, *three in zip(("correction", "d hidden", "d weight"), *results, strict=True):
        assert_as_exact_as_plain(*three, floor_eps=8 if dtype == torch.float32 else 1, what=what)


@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_a_label_of_all_rows_loses_nothing(dtype: torch.dtype) -> None:
    """A sum of 4000 equal numbers in bf16 stops at 256 of them."""
    hidden, weight = torch.full((4000, 2), 1.0, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
    weight.requires_grad_()
    labels = torch.ones(4000).long()
    found = soft_target_correction(hidden, weight, labels, smoothing=0.75, vocab_size=3)
    (d_weight,) = torch.autograd.grad(found.sum(), weight)
    expected = torch.tensor([[-1000.0], [2000], [-1000]]).expand(3, 2)
    torch.testing.assert_close(d_weight.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@every_mix
@of_every_kind("joint", "temperature 2", "one segment", "padding rows", "all ignored")
def test_beside_the_fused_loss_the_total_is_that_to_soft_targets(
    problem: Problem, mix: Mix
) -> None:
    """z-loss and KL stay."""
    hidden, weight, targets = problem.operands()
    labels, of_row = targets[: problem.rows[0]], per_row(problem, problem.ce)
    output = problem.run(hidden, weight, targets)
    correction = mix.correct(hidden, weight, labels, problem.vocab)
    total = output.total + SCALE * (of_row.to(correction) * correction).sum()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = define_total(problem, mix, wide[0], wide[1], targets)
    close = tolerances(problem)
    torch.testing.assert_close(total, truth, check_dtype=False, **close)
    torch.testing.assert_close(
        torch.autograd.grad(total, (hidden, weight)),
        torch.autograd.grad(truth, wide),
        check_dtype=False,
        **close,
    )


def per_row(problem: Problem, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).double().repeat_interleave(torch.tensor(problem.rows))


def define_total(
    problem: Problem, mix: Mix, hidden: Tensor, weight: Tensor, targets: Tensor
) -> Tensor:
    """In fp64."""
    soft = mix.define(hidden, weight, targets, problem.vocab)
    hard = problem.define(hidden, weight, targets).total
    return hard + SCALE * (per_row(problem, problem.ce) * soft).sum()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("vocab", [11, 9])  # 4 ranks hold 3, 3, 3, 2 of 11, and 3, 3, 3, 0 of 9
@every_mix
def test_shards_match_the_whole_vocabulary(mix: Mix, vocab: int, count: int) -> None:
    """Loss and correction read one tensor, whose gradient is then summed over the ranks."""
    problem = replace(PROBLEMS["temperature 2"], vocab=vocab)
    hidden, weight, targets = problem.operands()
    pieces = cut(problem, weight, count)  # NaN beyond the vocabulary

    def work(rank: int, gather: Gather) -> tuple[Tensor, ...]:
        piece, offset, size = pieces[rank]
        own = (hidden.detach().requires_grad_(), piece.clone().requires_grad_())
        shard = VocabShard(offset, size, gather if count > 1 else None)
        output = problem.run(*own, targets, vocab=shard)
        correction = mix.correct(*own, targets[: problem.rows[0]], vocab, shard)
        total = output.total + SCALE * (per_row(problem, problem.ce) * correction).sum()
        return correction.detach(), total.detach(), *torch.autograd.grad(total, own)

    results = Ranks(count).run(work)
    wide = [t.detach().requires_grad_() for t in (hidden, weight)]
    truth = define_total(problem, mix, wide[0], wide[1], targets)
    d_hidden, d_weight = torch.autograd.grad(truth, wide)
    expected = mix.define(hidden, weight, targets, vocab).detach()
    for correction, total, *_ in results:
        torch.testing.assert_close(correction, expected)
        assert torch.equal(correction, results[0][0])
        torch.testing.assert_close(total, truth.detach())
    torch.testing.assert_close(sum(r[2] for r in results), d_hidden)
    joined = torch.cat([r[3] for r in results])
    torch.testing.assert_close(joined[:vocab], d_weight)
    assert (joined[vocab:] == 0).all()


def test_ranks_gather_a_number_a_row_forward_and_nothing_backward() -> None:
    hidden, weight, y = operands(6, 3, 8)
    ranks, sent = Ranks(2, at_once=True), list[tuple[int, ...]]()

    def work(rank: int, gather: Gather) -> None:
        def watched(local: Tensor) -> Any:
            sent.append(tuple(local.shape))
            return gather(local)

        own = weight.detach()[4 * rank : 4 * rank + 4].clone().requires_grad_()
        shard = VocabShard(4 * rank, 4, watched)
        correction = MIXES["both"].correct(hidden, own, y, 8, shard)
        torch.autograd.grad(correction.sum(), (hidden, own))

    ranks.run(work)
    assert sent == [(18, 1)] * 2


@pytest.mark.parametrize("needs", ["hidden", "weight", "none"])
def test_frozen_operands_change_nothing(needs: str) -> None:
    hidden, weight, y = operands(7, 2, 5)
    mix = MIXES["both"]
    both = gradients(mix.correct(hidden, weight, y, 5), hidden, weight)
    hidden.requires_grad_(needs == "hidden")
    weight.requires_grad_(needs == "weight")
    found = mix.correct(hidden, weight, y, 5)
    if needs == "none":
        assert found.grad_fn is None
    else:
        learning, expected = (hidden, both[0]) if needs == "hidden" else (weight, both[1])
        assert torch.equal(gradients(found, learning)[0], expected)


@pytest.mark.parametrize("unknown", [11, -1, 10**12])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_id_outside_the_vocabulary_is_nan_in_its_rows(unknown: int, mixed: bool) -> None:
    hidden, weight, labels = operands(5, 2, 13)  # two rows of padding
    others = labels.clamp(min=0, max=10)
    labels = torch.where(labels == IGNORED, IGNORED, others)
    assert labels[2] == IGNORED
    (others if mixed else labels)[4] = unknown
    if mixed:
        others[2] = unknown  # of an ignored label, which nobody reads
    found = soft_target_correction(hidden, weight, labels, others, share=0.5, vocab_size=11)
    assert found.isnan().nonzero().flatten().tolist() == [4, 9]
    (d_hidden,) = torch.autograd.grad(found.sum(), hidden)
    assert d_hidden.isnan().any(-1).nonzero().flatten().tolist() == [4, 9]


class Largest(TorchDispatchMode):
    """The most bytes of a result of any operator, views left out."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor) and not func.is_view:
                self.most = max(self.most, one.nbytes)
        return result


def test_no_logit_is_made_and_the_weight_is_not_kept() -> None:
    labels, groups, vocab, d_model = 64, 4, 600, 16
    hidden, weight, y = operands(labels, groups, vocab, torch.float32, d_model)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = MIXES["both"].correct(hidden, weight, y, vocab)
    assert forward.most == 4 * labels * d_model  # one segment's
    assert {t.shape for t in saved if t.is_floating_point()} == {
        (groups, labels, d_model), (labels, d_model)
    }  # fmt: skip
    with Largest() as backward:
        torch.autograd.grad(found.sum(), (hidden, weight))
    assert backward.most == weight.nbytes


def test_double_backward_is_refused() -> None:
    hidden, weight, y = operands(3, 1, 4)
    found = soft_target_correction(hidden, weight, y, smoothing=0.1, vocab_size=4)
    with pytest.raises(RuntimeError, match="have no derivatives; call backward without create_gr"):
        torch.autograd.grad(found.sum(), hidden, create_graph=True)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden in three dimensions": ({"hidden": torch.zeros(1, 6, 4)}, r"hidden \[1, 6, 4\]"),
    "weight of another width": ({"weight": torch.zeros(5, 3)}, r"weight \[5, 3\] must be"),
    "dtypes differ": ({"weight": torch.zeros(5, 4).half()}, "must share a floating dtype"),
    "labels in int32": ({"labels": torch.zeros(3).int()}, r"\[torch.int32\] must be as many ids"),
    "others of another number": ({"others": torch.zeros(2).long()}, r"\[\[3\], \[2\]\]"),
    "rows in between": ({"hidden": torch.zeros(7, 4)}, "the 7 rows.* multiple of the 3 labels"),
    "share above 1": ({"share": 1.5}, r"share 1\.5 and smoothing 0\.0 must lie in 0 to 1"),
    "smoothing of NaN": ({"smoothing": float("nan")}, "smoothing nan must lie"),
    "share without others": ({"share": 0.5}, r"share is 0\.5; without others it must be 1"),
    "more ids than rows": ({"vocab_size": 6}, "a weight of 5 rows and a vocabulary of 6"),
    "no vocabulary": ({"vocab_size": 0}, "a vocabulary of 0"),
    "a shard beyond": ({"vocab": VocabShard(2, 4)}, r"offset=2, size=4.*vocabulary of 5"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_named(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(3).long(),
        "vocab_size": 5,
    }
    soft_target_correction(**call)
    with pytest.raises(ValueError, match=message):
        soft_target_correction(**call | change)
