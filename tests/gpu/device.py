"""What the tests on a GPU share: operands there, waiting that is forbidden, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from matformer_dist.ops.multi_granularity_loss import LossOutput
from matformer_dist.ops.vocab_shard import VocabShard
from tests.unit.ops.loss_problems import SCALE, Problem

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def short(value: object) -> str | None:
    """Names of dtypes in the names of tests."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
Step = Callable[..., tuple[Tensor, ...]]


def there(*tensors: Tensor) -> list[Tensor]:
    """Copies on the GPU, leaves that need gradients where the originals do."""
    return [t.detach().to(CUDA, copy=True).requires_grad_(t.requires_grad) for t in tensors]


class LossStep:
    """A problem's losses and gradients, compiled; all that it needs lies on the GPU already."""

    def __init__(self, problem: Problem, chunk_tokens: int | None = None) -> None:
        self.problem, self.chunk_tokens = problem, chunk_tokens
        self.shard = VocabShard(0, problem.vocab)
        self.scale = torch.full((), SCALE, device=CUDA)

    def losses(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> LossOutput:
        return self.problem.run(
            hidden,
            weight,
            targets,
            vocab=self.shard,
            scale=self.scale,
            chunk_tokens=self.chunk_tokens,
            impl="native",
        )

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """total, nll, lse, kl, d hidden, d weight."""
        output = self.losses(hidden, weight, targets)
        return *output[:4], *torch.autograd.grad(output.total, (hidden, weight))


def frobenius_error(actual: Tensor, truth: Tensor) -> float:
    """Of the whole tensor: ||actual - truth|| / ||truth||."""
    assert actual.shape == truth.shape
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_equal_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=0, atol=0, equal_nan=True)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raises at whatever makes the host wait for the GPU."""
    if CUDA.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs_free_bytes(count: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < count:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")


def replayed(step: Step, first: Sequence[Tensor], then: Sequence[Tensor]) -> list[Tensor]:
    """Captures step(*first) in a CUDA graph, and replays it over the values of `then`."""
    static = there(*first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their handles and workspaces before
        for _ in range(2):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*static)
    with torch.no_grad():
        for operand, value in zip(static, then, strict=True):
            operand.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return [result.clone() for result in results]
