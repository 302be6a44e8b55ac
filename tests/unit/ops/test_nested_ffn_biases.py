"""nested_ffn with biases of the neurons against a whole FFN whose activations are masked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from matformer_dist.ops.nested_ffn import Activation, nested_ffn
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops import test_nested_ffn as without
from tests.unit.ops.test_loss_vocab_shards import Gather, Ranks
from tests.unit.ops.test_nested_ffn import (
    ACTIVATIONS,
    INPUTS,
    NEURONS,
    SEGMENTS,
    Count,
    D,
    gradients,
    nested_problems,
)

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
Segments = tuple[Sequence[int], Sequence[int]]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    rows: Sequence[int],
    activation: Activation,
    dtype: torch.dtype = torch.float64,
    *,
    d_model: int = D,
    neurons: int = NEURONS,
) -> Operands:
    """x, w_in, w_out and b_in, which need gradients."""
    x, w_in, w_out = without.operands(rows, activation, dtype, d_model=d_model, neurons=neurons)
    b_in = torch.randn(INPUTS[activation] * neurons, dtype=torch.float64)
    return x, w_in, w_out, b_in.to(dtype).requires_grad_()


def masked_ffn(
    x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor, rows: Sequence[int], widths: Sequence[int]
) -> Tensor:
    """All rows through all neurons; those beyond a row's width count for nothing."""
    gate, *up = w_in.split(w_out.shape[1], dim=1)
    biases = b_in.view(len(w_in), -1).unbind(1)
    if up:
        act = F.silu(x @ gate.t() + biases[0]) * (x @ up[0].t() + biases[1])
    else:
        act = F.gelu(x @ gate.t() + biases[0])
    width_of_row = torch.repeat_interleave(torch.tensor(widths).long(), torch.tensor(rows).long())
    return (act * (torch.arange(len(w_in)) < width_of_row[:, None])) @ w_out


@every_activation
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_output_and_gradients_match_a_masked_ffn(
    segments: Segments, activation: Activation
) -> None:
    rows, widths = segments
    inputs = operands(rows, activation)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    expected = masked_ffn(*inputs, rows, widths)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


@settings(max_examples=60, deadline=None)
@given(nested_problems())
def test_any_nesting_matches_a_masked_ffn(
    problem: tuple[list[int], list[int], Activation, int],
) -> None:
    rows, widths, activation, d_model = problem
    inputs = operands(rows, activation, d_model=d_model, neurons=21)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    expected = masked_ffn(*inputs, rows, widths)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


@every_activation
def test_gradients_match_finite_differences(activation: Activation) -> None:
    def run(*inputs: Tensor) -> Tensor:
        return nested_ffn(*inputs, rows=(2, 0, 1), widths=(4, 3, 2), activation=activation)

    assert torch.autograd.gradcheck(run, operands((2, 1), activation, d_model=2, neurons=5))


@every_activation
def test_biases_of_zero_match_none(activation: Activation) -> None:
    rows, widths = SEGMENTS["ragged"]
    x, w_in, w_out, b_in = operands(rows, activation)
    options: dict[str, Any] = {"rows": rows, "widths": widths, "activation": activation}
    y = nested_ffn(x, w_in, w_out, torch.zeros_like(b_in), **options)
    plain = nested_ffn(x, w_in, w_out, **options)
    torch.testing.assert_close(y, plain)
    weights = (x, w_in, w_out)
    torch.testing.assert_close(gradients(y, weights), gradients(plain, weights))


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_plain(dtype: torch.dtype, activation: Activation) -> None:
    """2000 rows, of which a sum in bf16 would lose most."""
    rows, widths = (700, 865, 16, 440), (96, 48, 24, 8)
    inputs = operands(rows, activation, dtype, d_model=32, neurons=96)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    plain = masked_ffn(*inputs, rows, widths)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = masked_ffn(wide[0], wide[1], wide[2], wide[3], rows, widths)
    floor = 8 if dtype == torch.float32 else 1  # in fp32 the order of a GEMM's sums is the error
    assert_as_exact_as_plain(y, plain, truth, floor_eps=floor, what="y")
    all_gradients = [gradients(y, inputs), gradients(plain, inputs), gradients(truth, wide)]
    for name, *three in zip(("x", "w_in", "w_out", "b_in"), *all_gradients, strict=True):
        assert_as_exact_as_plain(*three, floor_eps=floor, what=f"d {name}")


@every_activation
@pytest.mark.parametrize(
    "needs", [needs for needs in itertools.product((True, False), repeat=4) if any(needs)]
)
def test_gradients_of_some_operands_match_those_of_all(
    needs: tuple[bool, ...], activation: Activation
) -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, activation)
    all_of_them = gradients(masked_ffn(*inputs, rows, widths), inputs)
    for operand, needed in zip(inputs, needs, strict=True):
        operand.requires_grad_(needed)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    wanted = [operand for operand in inputs if operand.requires_grad]
    with Count() as count:
        got = gradients(y, wanted)
    expected = [g for g, needed in zip(all_of_them, needs, strict=True) if needed]
    torch.testing.assert_close(got, tuple(expected))
    g, (needs_x, needs_in, needs_out, needs_biases) = len(rows), needs
    into_activation = g if needs_x or needs_in or needs_biases else 0
    assert count.products() == into_activation + g * needs_x + g * needs_in + g * needs_out
    assert count.calls["sum"] == g * needs_biases


@every_activation
@pytest.mark.parametrize(("name", "merged"), [("joint", 4), ("equal neighbours", 2), ("XL", 1)])
def test_biases_add_a_sum_a_ring_and_nothing_else(
    name: str, merged: int, activation: Activation
) -> None:
    """Forward the GEMM adds them; without them there is no trace of them."""
    rows, widths = SEGMENTS[name]
    inputs = operands(rows, activation)
    calls = []
    for given_ in (inputs, inputs[:3]):
        with Count() as forward:
            y = nested_ffn(*given_, rows=rows, widths=widths, activation=activation)
        with Count() as backward:
            gradients(y, given_)
        calls.append((forward.calls, backward.calls))
    (forward_with, backward_with), (forward_without, backward_without) = calls
    views = ("slice", "select", "view", "alias", "new_empty", "zero_", "fill_")
    for counts in itertools.chain(*calls):
        for view in views:
            counts.pop(view, None)
    assert not any(c["addmm"] + c["sum"] for c in (forward_without, backward_without))
    products = forward_without.pop("mm") - forward_with.pop("mm")
    assert products == forward_with.pop("addmm") == merged
    assert backward_with.pop("sum") == merged
    assert +forward_with == +forward_without and +backward_with == +backward_without


@every_activation
def test_biases_beyond_the_widest_segment_get_zero_gradient(activation: Activation) -> None:
    inputs, k = operands((3, 4), activation), INPUTS[activation]
    y = nested_ffn(*inputs, rows=(3, 4), widths=(10, 6), activation=activation)
    d_b = gradients(y, inputs)[3]
    assert (d_b[10 * k :] == 0).all() and (d_b[: 10 * k] != 0).all()


@every_activation
def test_any_order_matches_without_gradients_and_is_refused_with_them(
    activation: Activation,
) -> None:
    rows, widths = (3, 2, 0, 4, 1), (6, 24, 3, 12, 12)
    inputs = operands(rows, activation)
    frozen = [operand.detach() for operand in inputs]
    y = nested_ffn(*frozen, rows=rows, widths=widths, activation=activation)
    torch.testing.assert_close(y, masked_ffn(*inputs, rows, widths).detach())
    x, w_in, w_out, b_in = *frozen[:3], inputs[3]
    with pytest.raises(ValueError, match="must not increase"):
        nested_ffn(x, w_in, w_out, b_in, rows=rows, widths=widths, activation=activation)


@every_activation
def test_compiled_matches_eager(activation: Activation) -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, activation)

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        return nested_ffn(2 * x, *rest, rows=rows, widths=widths, activation=activation)

    eager = run(*inputs)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, inputs), gradients(eager, inputs))


def test_biases_are_not_saved() -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, "swiglu")
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nested_ffn(*inputs, rows=rows, widths=widths, activation="swiglu")
    activated = sum(r * m for r, m in zip(rows, widths, strict=True))
    assert sorted(t.numel() for t in saved) == sorted(
        [*(t.numel() for t in inputs[:3]), 2 * activated]
    )


class ThreadExchange:
    """Of rows between threads; what is started is done at once."""

    def __init__(self, size: int, rank: int, gather: Gather) -> None:
        self.size, self.rank, self._gather = size, rank, gather

    def start_gather(self, x: Tensor) -> Tensor:
        return self._gather(x.detach())().flatten(0, 1)

    def start_sum(self, y: Tensor) -> Tensor:
        return self._gather(y)().sum(0).chunk(self.size)[self.rank].clone()

    def wait(self, started: Tensor) -> Tensor:
        return started


@every_activation
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["joint", "empty segments", "equal neighbours"])
def test_rows_and_neurons_cut_over_ranks_match_the_whole(
    name: str, ranks: int, activation: Activation
) -> None:
    """Rings of 4 neurons and up, dealt over the ranks; each rank's rows are a cut through them."""
    rows, widths = tuple(4 * r for r in SEGMENTS[name][0]), SEGMENTS[name][1]
    widths = tuple(4 * width for width in widths)
    inputs = operands(rows, activation, neurons=4 * NEURONS)
    x, w_in, w_out, b_in = inputs
    y = masked_ffn(*inputs, rows, widths)
    expected = (y.detach(), *gradients(y, inputs))
    rings = sorted({0, *widths, 4 * NEURONS})
    dealt = [  # each rank's neurons, ring after ring
        torch.cat([torch.arange(low, high).chunk(ranks)[rank] for low, high in pairs])
        for rank in range(ranks)
        for pairs in [list(itertools.pairwise(rings))]
    ]

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_()

    def work(rank: int, gather: Gather) -> tuple[Tensor, ...]:
        mine = dealt[rank]
        biases = b_in.detach().view(4 * NEURONS, -1)[mine].flatten()
        own = [leaf(x.chunk(ranks)[rank]), leaf(w_in[mine]), leaf(w_out[mine]), leaf(biases)]
        local = nested_ffn(
            *own,
            rows=rows,
            widths=[width // ranks for width in widths],
            activation=activation,
            exchange=ThreadExchange(ranks, rank, gather),
        )
        return local.detach(), *gradients(local, own)

    found = Ranks(ranks, at_once=True).run(work)
    ys, d_xs, d_ins, d_outs, d_bs = zip(*found, strict=True)
    order = torch.cat(dealt).argsort()
    whole = (
        sum(ys),
        torch.cat(d_xs),
        torch.cat(d_ins)[order],
        torch.cat(d_outs)[order],
        torch.cat([d_b.view(-1, INPUTS[activation]) for d_b in d_bs])[order].flatten(),
    )
    torch.testing.assert_close(whole, expected)


BAD = {
    "one is missing": (torch.zeros(2 * NEURONS - 1), r"b_in \[47\].*must be contiguous \[48\]"),
    "a row for each neuron": (torch.zeros(NEURONS, 2), r"b_in \[24, 2\]"),
    "another dtype": (torch.zeros(2 * NEURONS).double(), r"torch.float64.* in torch.float32"),
    "gaps between": (torch.zeros(2 * NEURONS, 2)[:, 0], r"strides \(2,\)"),
}


@pytest.mark.parametrize(("b_in", "message"), BAD.values(), ids=BAD.keys())
def test_bad_biases_are_named(b_in: Tensor, message: str) -> None:
    x, w_in, w_out = torch.zeros(7, D), torch.zeros(NEURONS, 2 * D), torch.zeros(NEURONS, D)
    with pytest.raises(ValueError, match=message):
        nested_ffn(x, w_in, w_out, b_in, rows=(3, 4), widths=(8, 4), activation="swiglu")
