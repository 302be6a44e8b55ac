"""The loss over a vocabulary cut over ranks, against the whole one; ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.ops.multi_granularity_loss import LossOutput
from matformer_dist.ops.vocab_shard import VocabShard
from tests.unit.ops.loss_problems import Problem, of_every_kind, tolerances

Gather = Callable[[Tensor], Callable[[], Tensor]]
Result = tuple[LossOutput, tuple[Tensor, ...]]


class Ranks:
    """A gather for each of several threads, as an all-gather would be, and what the first one did:
    "start" and "wait". at_once: to start is to wait.
    """

    def __init__(self, count: int, at_once: bool = False) -> None:
        self.count, self.at_once, self.log = count, at_once, list[str]()
        self.boxes: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def gather(self, rank: int) -> Gather:
        def start(local: Tensor) -> Callable[[], Tensor]:
            self.log += ["start"] * (rank == 0)
            local = local.clone()  # as it is now

            def wait() -> Tensor:
                self.boxes[rank] = local
                self.barrier.wait()  # all have put theirs
                gathered = torch.stack([box for box in self.boxes if box is not None])
                self.log += ["wait"] * (rank == 0)
                self.barrier.wait()  # all have read them
                return gathered

            if not self.at_once:
                return wait
            gathered = wait()
            return lambda: gathered

        return start

    def run(self, work: Callable[[int, Gather], Any]) -> list[Any]:
        def guarded(rank: int) -> Any:
            try:
                return work(rank, self.gather(rank))
            except BaseException:
                self.barrier.abort()  # let nobody wait for a rank that failed
                raise

        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.count)]
        errors = [future.exception() for future in futures]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            if error is not None:
                raise error  # the cause, rather than those who waited for it
        return [future.result() for future in futures]


def cut(problem: Problem, weight: Tensor, ranks: int) -> list[tuple[Tensor, int, int]]:
    """Weight with its padding, offset and true size of each rank: equal pieces, zeros at the end.

    The padding holds NaN: whatever touches it shows.
    """
    size = -(-problem.vocab // ranks)
    whole = weight.detach()[: problem.vocab]
    padding = whole.new_full((size * ranks - problem.vocab, problem.d_model), torch.nan)
    pieces = torch.cat([whole, padding]).split(size)
    offsets = range(0, size * ranks, size)
    sizes = [min(size, max(0, problem.vocab - offset)) for offset in offsets]
    return list(zip(pieces, offsets, sizes, strict=True))


def run_ranks(
    problem: Problem,
    operands: Sequence[Tensor],
    count: int,
    at_once: bool = False,
    **options: Any,
) -> tuple[list[Result], list[str]]:
    """Outputs and gradients of (hidden, weight) on each rank, and what the gathers did."""
    hidden, weight, targets = operands
    ranks = Ranks(count, at_once)
    pieces = cut(problem, weight, count)

    def work(rank: int, gather: Gather) -> Result:
        piece, offset, size = pieces[rank]
        own = (hidden.detach().requires_grad_(), piece.clone().requires_grad_())
        output = problem.run(*own, targets, vocab=VocabShard(offset, size, gather), **options)
        upstream = torch.tensor(-3.0, dtype=output.total.dtype)
        return output, torch.autograd.grad(output.total, own, upstream)

    return ranks.run(work), ranks.log


@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
@pytest.mark.parametrize("count", [1, 2, 4])
@of_every_kind()
def test_shards_match_the_whole_vocabulary(
    problem: Problem, count: int, chunk_tokens: int | None
) -> None:
    operands = problem.operands()
    results, _ = run_ranks(problem, operands, count, chunk_tokens=chunk_tokens)
    expected, (d_hidden, d_weight) = problem.truth(*operands, upstream=-3.0)
    close = tolerances(problem)
    for output, _ in results:
        for name, value in expected._asdict().items():
            torch.testing.assert_close(getattr(output, name), value, check_dtype=False, **close)
        torch.testing.assert_close(output._asdict(), results[0][0]._asdict(), rtol=0, atol=0)
    whole = sum(gradients[0] for _, gradients in results)
    torch.testing.assert_close(whole, d_hidden, check_dtype=False, **close)
    joined = torch.cat([gradients[1] for _, gradients in results])
    size = problem.vocab
    torch.testing.assert_close(joined[:size], d_weight[:size], check_dtype=False, **close)
    assert (joined[size:] == 0).all()


@of_every_kind("joint", vocab=9, temperature=2.0)  # pieces of 3, 3, 3 and 0
def test_a_share_of_padding_alone_takes_no_part(problem: Problem) -> None:
    operands = problem.operands()
    assert cut(problem, operands[1], 4)[3][2] == 0
    results, _ = run_ranks(problem, operands, 4)
    expected, _ = problem.truth(*operands)
    close = tolerances(problem)
    for output, _ in results:
        for name, value in expected._asdict().items():
            torch.testing.assert_close(getattr(output, name), value, check_dtype=False, **close)
    assert not any(gradient.any() for gradient in results[3][1])


@pytest.mark.parametrize("granularities", [1, 3])
def test_two_gathers_a_chunk_overlap_whatever_the_number_of_granularities(
    granularities: int,
) -> None:
    """Both are under way before one is waited for. 9 tokens: chunks of 4, 4 and 1."""
    problem = Problem(
        rows=(9,) * granularities,
        ce=(1,) * granularities,
        z=(0.1,) * granularities,
        kl=(0.0, 0.5, 0.5)[:granularities],
        temperature=2.0,
    )
    _, log = run_ranks(problem, problem.operands(), 2, chunk_tokens=4)
    assert log == [*["start", "start", "wait", "wait"] * 2, "start", "wait"]


@of_every_kind()
def test_gathers_beside_other_work_change_no_bit(problem: Problem) -> None:
    """Against gathers that are there before anything else goes on."""
    operands = problem.operands()
    beside, log = run_ranks(problem, operands, 2, chunk_tokens=3)
    at_once, other_log = run_ranks(problem, operands, 2, at_once=True, chunk_tokens=3)
    assert sorted(log) == sorted(other_log) and other_log == ["start", "wait"] * (len(log) // 2)
    for (one, gradients), (other, expected) in zip(beside, at_once, strict=True):
        for name, value in other._asdict().items():
            found = getattr(one, name)
            assert found is value is None or torch.equal(found, value), name
        assert all(map(torch.equal, gradients, expected))


@of_every_kind("joint", rows=(2, 2), ce=(1, 1), z=(0, 0), kl=(0, 0), vocab=4, d_model=4)
def test_best_over_shards_is_the_lowest_of_equal_ids(problem: Problem) -> None:
    hidden = torch.tensor([[0.0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    hidden, weight = hidden.to(problem.dtype), torch.eye(4, dtype=problem.dtype)
    results, _ = run_ranks(problem, (hidden, weight, torch.ones(4).long()), 2)
    for output, _ in results:
        assert output.best is not None and output.best.tolist() == [1, 1, 1, 2]


@of_every_kind("joint", rows=(1, 1), ce=(1, 1), z=(0, 0), kl=(0, 0), vocab=2, d_model=2)
def test_best_tells_ids_of_far_shards_apart(problem: Problem) -> None:
    """2^24 and 2^24 + 1 are the same number in fp32."""
    hidden, ranks = torch.eye(2, dtype=problem.dtype), Ranks(2)
    weights = (torch.zeros_like(hidden), torch.eye(2, dtype=problem.dtype))

    def work(rank: int, gather: Gather) -> LossOutput:
        shard = VocabShard(rank * 2**24, 2, gather)
        return problem.run(hidden, weights[rank], torch.zeros(2).long(), vocab=shard)

    for output in ranks.run(work):
        assert output.best is not None and output.best.tolist() == [2**24, 2**24 + 1]


@pytest.mark.parametrize("target", [11, -1, 12])
@of_every_kind("joint")  # 11 ids; two ranks hold 6 and 5 and one row of padding
def test_a_target_that_no_rank_owns_is_nan_or_named_on_every_rank(
    problem: Problem, target: int
) -> None:
    hidden, weight, targets = problem.operands()
    targets[4] = target
    for output, (d_hidden, d_weight) in run_ranks(problem, (hidden, weight, targets), 2)[0]:
        assert output.total.isnan() and d_hidden.isnan().any() and d_weight.isnan().any()
    with pytest.raises(ValueError, match=rf"targets \[{target}\] are not ids of the vocabulary"):
        run_ranks(problem, (hidden, weight, targets), 2, check_targets=True)
