"""Operands of more than 2^31 values, against small calls over their first and last rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.device import CUDA, assert_equal_bits, needs_free_bytes

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def test_logits_beyond_32_bits_match_a_small_call() -> None:
    """8200 rows of 2^18 bf16 logits: 4.3 GB, twice."""
    tokens, vocab, few = 8200, 1 << 18, 3
    assert tokens * vocab > 2**31
    needs_free_bytes(10 << 30)
    ops = torch.ops.matformer_dist
    logits = torch.randn(1, tokens, vocab, device=CUDA, dtype=BF16)
    targets = torch.randint(vocab, (1, tokens), device=CUDA)
    weights = [torch.rand(1, tokens, device=CUDA) for _ in range(3)]
    parts = [slice(few), slice(tokens // 2, tokens // 2 + few), slice(-few, None)]
    small = [(logits[:, part].clone(), targets[:, part].contiguous()) for part in parts]
    numbers = ops.chunk_statistics(logits, targets, 0, 1.0, False, True)
    rest = (0, -100, 1.0, False, BF16)
    results, best = ops.chunk_gradient_(logits, targets, numbers[None], *weights, *rest)
    for part, (own, y) in zip(parts, small, strict=True):
        expected = ops.chunk_statistics(own, y, 0, 1.0, False, True)
        own_weights = [w[:, part].contiguous() for w in weights]
        outcome = ops.chunk_gradient_(own, y, expected[None], *own_weights, *rest)
        assert_equal_bits(
            (numbers[:, part], results[:, :, part], best[:, part], logits[:, part]),
            (expected, *outcome, own),
        )


def test_activations_beyond_32_bits_match_a_small_call() -> None:
    """Segments of 2^16 rows; the wide one alone has more than 2^31 pre-activations."""
    rows, widths = (1 << 16, 1 << 16), (16400, 8)
    neurons = sum(r * m for r, m in zip(rows, widths, strict=True))
    assert rows[0] * widths[0] * 2 > 2**31
    needs_free_bytes(20 << 30)
    ops = torch.ops.matformer_dist
    h = torch.randn(neurons, 2, device=CUDA, dtype=BF16)
    d_act = torch.randn(neurons, device=CUDA, dtype=BF16)
    forward = ops.nested_activation(h)
    act, d_h = ops.nested_activation_backward(h, d_act, rows, widths, True)
    last_wide = slice(widths[0] * (rows[0] - 2), widths[0] * rows[0])
    for part, row, width in (
        (slice(widths[0] * 2), slice(2), widths[0]),
        (last_wide, slice(rows[0] - 2, rows[0]), widths[0]),
        (slice(neurons - 2 * widths[1], neurons), slice(sum(rows) - 2, sum(rows)), widths[1]),
    ):
        own_h, own_d = h[part].clone(), d_act[part].clone()
        assert_equal_bits((forward[part],), (ops.nested_activation(own_h),))
        assert_equal_bits(
            (act[row, :width], d_h[row, : 2 * width]),
            ops.nested_activation_backward(own_h, own_d, [2], [width], True),
        )
