"""What both operators promise on a GPU: no waiting, equal bits, CUDA graphs, torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from matformer_dist.ops.nested_ffn import Activation, nested_ffn
from tests.gpu.device import (
    CUDA,
    DTYPES,
    LossStep,
    Step,
    assert_equal_bits,
    every_dtype,
    replayed,
    short,
    there,
    waiting_is_an_error,
)
from tests.gpu.test_nested_ffn import ACTIVATIONS, operands
from tests.unit.ops.loss_problems import IGNORED, SCALE, Problem

ROWS, WIDTHS = (65, 64, 63), (512, 264, 33)
PROBLEM = Problem(rows=(130,) * 3, vocab=2051, d_model=64, temperature=2.0)
CASES = [(name, dtype) for name in ("loss", *ACTIVATIONS) for dtype in DTYPES]
every_case = pytest.mark.parametrize(("name", "dtype"), CASES, ids=short)


def ffn_step(activation: Activation) -> Step:
    def step(x: Tensor, w_in: Tensor, w_out: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *b_in, d_y = rest
        y = nested_ffn(
            x, w_in, w_out, *b_in, rows=ROWS, widths=WIDTHS, activation=activation, impl="native"
        )
        return y.detach(), *torch.autograd.grad(y, (x, w_in, w_out, *b_in), d_y)

    return step


def case(name: str, dtype: torch.dtype) -> tuple[Step, list[Tensor]]:
    """A forward and backward pass, and its operands on the GPU. GELU has biases."""
    if name == "loss":
        problem = replace(PROBLEM, dtype=dtype)
        return LossStep(problem, 50), there(*problem.operands())
    activation: Activation = "swiglu" if name == "swiglu" else "gelu"
    biases = activation == "gelu"
    return ffn_step(activation), operands(ROWS, WIDTHS, activation, dtype, biases)


@every_case
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    step, inputs = case(name, dtype)
    step(*inputs)  # libraries make their handles
    with waiting_is_an_error():
        step(*inputs)


@every_case
def test_repeats_are_equal_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    step, inputs = case(name, dtype)
    expected = step(*inputs)
    for _ in range(5):
        assert_equal_bits(step(*inputs), expected)


@every_case
def test_two_streams_at_once_are_equal_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    step, inputs = case(name, dtype)
    expected = step(*inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(*inputs))
    torch.cuda.synchronize()
    for result in results:
        assert_equal_bits(result, expected)


@every_case
def test_a_cuda_graph_replays_over_new_operands(name: str, dtype: torch.dtype) -> None:
    step, first = case(name, dtype)
    then = [t.detach().flip(0) for t in first]  # other values of the same kind
    for t, like in zip(then, first, strict=True):
        t.requires_grad_(like.requires_grad)
    assert_equal_bits(replayed(step, first, then), step(*then))


@every_case
def test_compiled_without_a_graph_break_matches_eager(name: str, dtype: torch.dtype) -> None:
    """By inductor, its own pieces before and behind the operator."""
    step, inputs = case(name, dtype)
    learning = [t for t in inputs if t.requires_grad]

    def total(*operands: Tensor) -> Tensor:
        first, *rest = operands
        if isinstance(step, LossStep):
            return step.losses(2 * first, *rest).total * 2
        activation: Activation = "swiglu" if name == "swiglu" else "gelu"
        w_in, w_out, *b_in, d_y = rest
        y = nested_ffn(
            2 * first, w_in, w_out, *b_in, rows=ROWS, widths=WIDTHS, activation=activation,
            impl="native",
        )  # fmt: skip
        return (y * d_y).float().square().mean() * 2

    torch.compiler.reset()
    compiled, eager = torch.compile(total, fullgraph=True)(*inputs), total(*inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(compiled, eager, rtol=4 * eps, atol=4 * eps)
    for got, expected in zip(
        torch.autograd.grad(compiled, learning), torch.autograd.grad(eager, learning), strict=True
    ):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=4 * eps, atol=4 * eps * scale)


@every_dtype
def test_operators_keep_torchs_contract(dtype: torch.dtype) -> None:
    """Schema, fake implementation, autograd registration and their use by AOTAutograd."""
    ops, check = torch.ops.matformer_dist, torch.library.opcheck
    problem = replace(PROBLEM, rows=(6,) * 3, vocab=40, dtype=dtype)
    hidden, weight, targets = there(*problem.operands())
    step = LossStep(problem)
    weights = [[float(w) for w in values] for values in (problem.ce, problem.z, problem.kl)]
    loss = (
        hidden, weight, targets, step.scale, list(problem.rows), *weights, True, 2.0, IGNORED,
        step.shard.key, 4, False, True, True, True,
    )  # fmt: skip
    check(ops.multi_granularity_loss.default, loss)
    logits, y = (hidden @ weight.t()).detach().view(3, 6, 40), targets.view(3, 6)
    check(ops.chunk_statistics.default, (logits, y, 0, 2.0, True, True))
    ranks = ops.chunk_statistics(logits, y, 0, 2.0, True, True)[None]
    ones = torch.full((3, 6), SCALE, device=CUDA)
    for gradient in (dtype, None):
        rest = (y, ranks, ones, ones, ones, 0, IGNORED, 2.0, True, gradient)
        check(ops.chunk_gradient_.default, (logits.clone(), *rest))
    for k in (1, 2):
        h = torch.randn(5 * 40, k, device=CUDA, dtype=dtype)
        check(ops.nested_activation.default, (h,))
        # one width: what lies right of a narrower segment is left as it was found
        check(ops.nested_activation_backward.default, (h, h[:, 0].clone(), [2, 3], [40, 40], True))
