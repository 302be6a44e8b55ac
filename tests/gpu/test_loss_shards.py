"""The loss over a vocabulary in pieces, whose ranks are threads that share one GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from matformer_dist.ops.multi_granularity_loss import LossOutput
from matformer_dist.ops.vocab_shard import VocabShard
from tests.gpu.device import CUDA, every_dtype, there
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import PROBLEMS, SCALE, Problem
from tests.unit.ops.test_loss_vocab_shards import Gather, Ranks, cut

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
Result = tuple[LossOutput, tuple[Tensor, ...]]


def run_ranks(problem: Problem, operands: list[Tensor], count: int, chunk: int) -> list[Result]:
    """Outputs and gradients of (hidden, weight) on each rank; the upstream gradient is -3."""
    hidden, weight, targets = operands
    pieces = cut(problem, weight, count)
    scale = torch.full((), SCALE, device=CUDA)

    def work(rank: int, gather: Gather) -> Result:
        piece, offset, size = pieces[rank]
        own = (hidden.detach().requires_grad_(), piece.clone().requires_grad_())
        shard = VocabShard(offset, size, gather)
        output = problem.run(
            *own, targets, vocab=shard, scale=scale, chunk_tokens=chunk, impl="native"
        )
        upstream = torch.full_like(output.total, -3.0)
        return output, torch.autograd.grad(output.total, own, upstream)

    results: list[Result] = Ranks(count).run(work)
    return results


SHARDED = {
    **{name: PROBLEMS[name] for name in ("joint", "temperature 2", "separate", "logits up to 100")},
    "a share of padding": Problem(vocab=9, temperature=2.0),
    "a few thousand words": Problem(rows=(65,) * 3, vocab=4099, d_model=32, temperature=2.0),
}


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("count", [1, 2, 4])
@every_dtype
@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_as_exact_as_plain_over_the_whole_vocabulary(
    name: str, dtype: torch.dtype, count: int, chunk: int
) -> None:
    problem = replace(SHARDED[name], dtype=dtype)
    hidden, weight, targets = there(*problem.operands())
    results = run_ranks(problem, [hidden, weight, targets], count, chunk)
    plain = problem.define(hidden, weight, targets)
    truth, (d_hidden, d_weight) = problem.truth(hidden, weight, targets, upstream=-3.0)
    upstream = torch.full_like(plain.total, -3.0)
    plain_hidden, plain_weight = torch.autograd.grad(plain.total, (hidden, weight), upstream)
    first = results[0][0]
    for output, _ in results:
        torch.testing.assert_close(output._asdict(), first._asdict(), rtol=0, atol=0)
    for field in ("total", "nll", "lse", "kl"):
        three = [getattr(output, field).detach() for output in (first, plain, truth)]
        assert_as_exact_as_plain(*three, floor_eps=16, what=field)
    floor = 64 if dtype == torch.float32 else 1
    # The sum over ranks is the caller's, and rounds what each has rounded.
    summed = torch.stack([g[0].double() for _, g in results]).sum(0).to(dtype)
    assert_as_exact_as_plain(
        summed, plain_hidden, d_hidden, floor_eps=floor + count - 1, what="d hidden"
    )
    joined = torch.cat([g[1] for _, g in results])
    words = slice(problem.vocab)
    assert_as_exact_as_plain(
        joined[words], plain_weight[words], d_weight[words], floor_eps=floor, what="d weight"
    )
    assert (joined[problem.vocab :] == 0).all()
