"""Every compiled kernel on small operands against the plain torch one: what sanitizers run too.

No GEMM, and nothing is filled that a kernel should have written. Legend: G rows of one token, c
tokens, V columns.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.ops import head_chunk
from matformer_dist.ops.head_chunk import packed
from matformer_dist.ops.nested_activation import activate, activate_backward
from tests.gpu.device import CUDA, DTYPES, every_dtype, short, there

PAIRS = [(torch.float32, gradient) for gradient in (*DTYPES, None)] + [
    (dtype, gradient) for dtype in DTYPES[1:] for gradient in (dtype, None)
]
OPTIONS = {
    "teacher, tau 1": (1.0, True, True),
    "teacher, tau 2": (2.0, True, True),
    "no teacher": (1.0, False, False),
}
IGNORED = -100
EPS32 = torch.finfo(torch.float32).eps


def chunk(dtype: torch.dtype, vocab: int, groups: int = 3, tokens: int = 5) -> list[Tensor]:
    """logits, targets (some ignored, some of another rank), and weights ce, z, kl."""
    generator = torch.Generator().manual_seed(vocab)
    shape = (groups, tokens)
    logits = 4 * torch.randn(*shape, vocab, generator=generator)
    targets = 10 + torch.randint(-3, vocab + 3, shape, generator=generator)
    targets[:, 0], targets[:, 1], targets[:, 2] = IGNORED, 10, 10 + vocab - 1
    ce, z, kl = (torch.rand(*shape, generator=generator) for _ in range(3))
    return [logits.to(dtype), targets, ce, z / 10, kl]


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("vocab", [1, 8, 511, 4096, 12321])
@pytest.mark.parametrize(("dtype", "gradient"), PAIRS, ids=short)
def test_chunk_kernels_match_plain_torch(
    dtype: torch.dtype,
    gradient: torch.dtype | None,
    vocab: int,
    option: tuple[float, bool, bool],
) -> None:
    tau, distills, find_best = option
    logits, targets, *weights = there(*chunk(dtype, vocab))
    rest: tuple[Any, ...] = (10, IGNORED, tau, distills, gradient)
    twins = (torch.ops.matformer_dist, head_chunk)
    numbers = [
        twin.chunk_statistics(logits, targets, 10, tau, distills, find_best) for twin in twins
    ]
    # Sums of exponentials of fp32: some units, more where the terms of KL cancel.
    torch.testing.assert_close(*numbers, rtol=64 * EPS32, atol=64 * EPS32)
    # Two ranks that hold the same: as good as any others, and the join has something to do.
    ranks = numbers[1][None].repeat(2, 1, 1, 1)
    outcomes = []
    for twin in twins:
        own = logits.clone()
        results, best = twin.chunk_gradient_(own, targets, ranks, *weights, *rest)
        d = packed(own, gradient) if gradient else own
        outcomes.append((results, best, d.float()))
    torch.testing.assert_close(outcomes[0][:2], outcomes[1][:2], rtol=64 * EPS32, atol=64 * EPS32,
                               equal_nan=True)  # fmt: skip
    eps = torch.finfo(gradient or dtype).eps  # one rounding apart
    torch.testing.assert_close(
        outcomes[0][2], outcomes[1][2], rtol=eps + 64 * EPS32, atol=64 * EPS32, equal_nan=True
    )
    if gradient is None:
        assert torch.equal(outcomes[0][2], logits.float())


@pytest.mark.parametrize("groups", [1, 2, 9])
def test_groups_of_any_number_match_plain_torch(groups: int) -> None:
    logits, targets, *_ = there(*chunk(torch.bfloat16, 1000, groups=groups, tokens=3))
    numbers = [
        twin.chunk_statistics(logits, targets, 10, 2.0 if groups > 1 else 1.0, groups > 1, True)
        for twin in (torch.ops.matformer_dist, head_chunk)
    ]
    torch.testing.assert_close(*numbers, rtol=64 * EPS32, atol=64 * EPS32)


@every_dtype
def test_operands_that_begin_anywhere_match_those_that_begin_aligned(dtype: torch.dtype) -> None:
    def moved(t: Tensor) -> Tensor:
        """A copy one value behind an aligned address."""
        buffer = t.new_empty(t.numel() + 1)
        return buffer[1:].copy_(t.flatten()).view(t.shape)

    logits, targets, *weights = there(*chunk(dtype, 4096))
    ops, results = torch.ops.matformer_dist, []
    for own in (moved(logits), logits):
        numbers = ops.chunk_statistics(own, targets, 10, 2.0, True, True)
        rest = (numbers[None], *weights, 10, IGNORED, 2.0, True, dtype)
        results.append((*ops.chunk_gradient_(own, targets, *rest), own))
    # The values a thread sums depend on the width of its accesses.
    rtol, atol = torch.finfo(dtype).eps + 64 * EPS32, 64 * EPS32
    torch.testing.assert_close(*results, rtol=rtol, atol=atol, equal_nan=True)
    h, d_act = logits.view(-1, 2), logits.flatten()[::2].contiguous()
    rest_of = ([len(h) // 512], [512], True)
    assert torch.equal(ops.nested_activation(moved(h)), ops.nested_activation(h))
    for got, want in zip(
        ops.nested_activation_backward(moved(h), moved(d_act), *rest_of),
        ops.nested_activation_backward(h, d_act, *rest_of),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_a_share_without_columns_has_no_part() -> None:
    logits, targets, *_ = there(*chunk(torch.float32, 1))
    got = torch.ops.matformer_dist.chunk_statistics(
        logits[..., :0].contiguous(), targets, 10, 2.0, True, True
    )
    expected = head_chunk.chunk_statistics(logits[..., :0], targets, 10, 2.0, True, True)
    assert (got[..., [0, 3]] == -torch.inf).all()
    torch.testing.assert_close(got[..., :5], expected[..., :5], rtol=0, atol=0)


SEGMENTS = {
    "aligned": ((3, 3, 3), (512, 256, 64)),
    "odd": ((2, 5, 1, 4), (301, 33, 7, 1)),
    "empty ones": ((0, 4, 0), (64, 40, 8)),
    "more than one launch": ((1,) * 70, tuple(range(80, 10, -1))),
    "no rows": ((0, 0), (8, 4)),
}


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@every_dtype
def test_activation_kernels_match_plain_torch(
    dtype: torch.dtype,
    segments: tuple[tuple[int, ...], tuple[int, ...]],
    k: int,
    wants: tuple[bool, bool],
) -> None:
    """Plain torch in fp32: the kernels round once, and torch's in low precision more often."""
    rows, widths = segments
    neurons = sum(r * m for r, m in zip(rows, widths, strict=True))
    generator = torch.Generator().manual_seed(0)
    h_cpu = 3 * torch.randn(neurons, k, generator=generator)
    h, d_act = there(h_cpu.to(dtype), torch.randn(neurons, generator=generator).to(dtype))
    rtol, atol = torch.finfo(dtype).eps + 32 * EPS32, 32 * EPS32
    act = activate(h, "native")
    torch.testing.assert_close(act.float(), activate(h.float(), "reference"), rtol=rtol, atol=atol)
    wants_act, wants_d_h = wants
    found = activate_backward(h, d_act if wants_d_h else None, rows, widths, wants_act, "native")
    expected = activate_backward(
        h.float(), d_act.float() if wants_d_h else None, rows, widths, wants_act, "reference"
    )
    for got, want, per_neuron in zip(found, expected, (1, k), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        if len(got) == 0:
            continue
        for stop, count, width in zip(itertools.accumulate(rows), rows, widths, strict=True):
            block = slice(stop - count, stop), slice(per_neuron * width)
            torch.testing.assert_close(got[block].float(), want[block], rtol=rtol, atol=atol)


def test_operands_on_two_devices_are_refused() -> None:
    logits, targets, ce, z, kl = chunk(torch.float32, 8)
    ops = torch.ops.matformer_dist
    there_, cpu = logits.to(CUDA), logits
    for call in (
        lambda: ops.chunk_statistics(there_, targets, 0, 1.0, True, True),
        lambda: ops.chunk_statistics(cpu, targets.to(CUDA), 0, 1.0, True, True),
        lambda: ops.chunk_gradient_(
            there_, targets.to(CUDA), torch.zeros(1, 3, 5, 7, device=CUDA), ce, z.to(CUDA),
            kl.to(CUDA), 0, IGNORED, 1.0, True, torch.float32,
        ),
        lambda: ops.nested_activation_backward(
            torch.zeros(4, 2, device=CUDA), torch.zeros(4), [1], [4], True
        ),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="lies on another device than the first operand"):
            call()
