"""The correction to soft targets on a GPU: against plain torch in fp64, and what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.device import (
    CUDA,
    Step,
    assert_equal_bits,
    every_dtype,
    replayed,
    there,
    waiting_is_an_error,
)
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.test_soft_targets import MIXES, Mix, operands

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
VOCAB, GROUPS = 1003, 4
every_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())


def step_of(mix: Mix) -> Step:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        found = mix.correct(hidden, weight, labels, VOCAB)
        upstream = torch.full_like(found, -3.0)
        return found.detach(), *torch.autograd.grad(found, (hidden, weight), upstream)

    return step


@pytest.mark.parametrize("labels", [1, 130, 2100])  # lookups' gradients: two kernels of torch's
@every_dtype
@every_mix
def test_correction_and_gradients_are_as_exact_as_plain(
    mix: Mix, dtype: torch.dtype, labels: int
) -> None:
    hidden, weight, y = there(*operands(labels, GROUPS, VOCAB, dtype, d_model=72))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    results = [step_of(mix)(hidden, weight, y)]
    for h, w in ((hidden, weight), wide):
        plain = mix.define(h, w, y.repeat(GROUPS), VOCAB)
        upstream = torch.full_like(plain, -3.0)
        results.append((plain.detach(), *torch.autograd.grad(plain, (h, w), upstream)))
    for what, *three in zip(("correction", "d hidden", "d weight"), *results, strict=True):
        assert_as_exact_as_plain(*three, floor_eps=16 if dtype == torch.float32 else 1, what=what)


@every_dtype
def test_it_waits_for_nothing_and_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    step, inputs = step_of(MIXES["both"]), there(*operands(2100, GROUPS, VOCAB, dtype, d_model=72))
    expected = step(*inputs)
    with waiting_is_an_error():
        again = [step(*inputs) for _ in range(4)]
    for results in again:
        assert_equal_bits(results, expected)


@pytest.mark.skipif(CUDA.type == "cpu", reason="no CUDA device")
@every_dtype
def test_a_cuda_graph_replays_over_new_operands(dtype: torch.dtype) -> None:
    step, first = step_of(MIXES["both"]), there(*operands(130, GROUPS, VOCAB, dtype, d_model=72))
    then = [t.detach().flip(0) for t in first]
    for t, like in zip(then, first, strict=True):
        t.requires_grad_(like.requires_grad)
    assert_equal_bits(replayed(step, first, then), step(*then))
