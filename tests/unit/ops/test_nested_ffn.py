"""nested_ffn against plain FFNs, one a segment, whose gradients autograd makes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from matformer_dist.ops.nested_ffn import Activation, nested_ffn
from tests.tolerance import assert_as_exact_as_plain

D, NEURONS = 5, 24
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "gelu")
INPUTS = {"swiglu": 2, "gelu": 1}
# name: (rows, widths), widest first
SEGMENTS = {
    "XL": ((7,), (24,)),
    "L": ((7,), (12,)),
    "M": ((1,), (6,)),
    "S": ((7,), (3,)),
    "joint": ((5, 5, 5, 5), (24, 12, 6, 3)),
    "ragged": ((1, 6, 2, 9), (24, 12, 6, 3)),
    "no XL": ((3, 4), (12, 6)),
    "equal neighbours": ((2, 3, 4, 1), (12, 12, 6, 6)),
    "empty segments": ((0, 4, 0, 3, 0), (24, 12, 6, 3, 1)),
    "one neuron": ((2, 3), (2, 1)),
    "no rows": ((0, 0), (24, 6)),
    "no segments": ((), ()),
}
Operands = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Whatever reads what nobody wrote gives NaN."""
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
    torch.manual_seed(0)
    shapes = ((sum(rows), d_model), (neurons, INPUTS[activation] * d_model), (neurons, d_model))
    x, w_in, w_out = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), w_in.requires_grad_(), w_out.requires_grad_()


def plain_ffn(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """sigma(x W1^T) W2 (paper sec. 3.1), gated where there is a second half of w_in."""
    gate, *up = w_in.split(w_out.shape[1], dim=1)
    if not up:
        return F.gelu(F.linear(x, gate)) @ w_out
    return (F.silu(F.linear(x, gate)) * F.linear(x, up[0])) @ w_out


def separate_passes(
    x: Tensor, w_in: Tensor, w_out: Tensor, rows: Sequence[int], widths: Sequence[int]
) -> Tensor:
    parts = zip(x.split(list(rows)), widths, strict=True)
    return torch.cat([x[:0], *(plain_ffn(part, w_in[:m], w_out[:m]) for part, m in parts)])


def gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(y, tuple(inputs), d_y.to(y.dtype), materialize_grads=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_output_and_gradients_match_separate_passes(
    segments: tuple[tuple[int, ...], tuple[int, ...]], activation: Activation
) -> None:
    rows, widths = segments
    inputs = operands(rows, activation)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    expected = separate_passes(*inputs, rows, widths)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


@st.composite
def nested_problems(draw: st.DrawFn) -> tuple[list[int], list[int], Activation, int]:
    widths = sorted(draw(st.lists(st.integers(1, 20), min_size=1, max_size=6)), reverse=True)
    rows = draw(st.lists(st.integers(0, 9), min_size=len(widths), max_size=len(widths)))
    return rows, widths, draw(st.sampled_from(ACTIVATIONS)), draw(st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(nested_problems())
def test_any_nesting_matches_separate_passes(
    problem: tuple[list[int], list[int], Activation, int],
) -> None:
    rows, widths, activation, d_model = problem
    inputs = operands(rows, activation, d_model=d_model, neurons=21)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    expected = separate_passes(*inputs, rows, widths)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_finite_differences(activation: Activation) -> None:
    def run(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return nested_ffn(x, w_in, w_out, rows=(2, 1), widths=(4, 2), activation=activation)

    assert torch.autograd.gradcheck(run, operands((2, 1), activation, d_model=2, neurons=5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_plain(dtype: torch.dtype, activation: Activation) -> None:
    rows, widths = (33, 65, 16, 40), (96, 48, 24, 8)
    inputs = operands(rows, activation, dtype, d_model=32, neurons=96)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    plain = separate_passes(*inputs, rows, widths)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = separate_passes(wide[0], wide[1], wide[2], rows, widths)
    floor = 8 if dtype == torch.float32 else 1  # in fp32 the order of a GEMM's sums is the error
    assert_as_exact_as_plain(y, plain, truth, floor_eps=floor, what="y")
    all_gradients = [gradients(y, inputs), gradients(plain, inputs), gradients(truth, wide)]
    for name, *three in zip(("x", "w_in", "w_out"), *all_gradients, strict=True):
        assert_as_exact_as_plain(*three, floor_eps=floor, what=f"d {name}")


NEEDED = [needs for needs in itertools.product((True, False), repeat=3) if any(needs)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("needs", NEEDED)
def test_gradients_of_some_operands_match_those_of_all(
    needs: tuple[bool, bool, bool], activation: Activation
) -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, activation)
    all_of_them = gradients(separate_passes(*inputs, rows, widths), inputs)
    for operand, needed in zip(inputs, needs, strict=True):
        operand.requires_grad_(needed)
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    wanted = [operand for operand in inputs if operand.requires_grad]
    expected = [g for g, needed in zip(all_of_them, needs, strict=True) if needed]
    with Count() as count:
        got = gradients(y, wanted)
    torch.testing.assert_close(got, tuple(expected))
    g, (needs_x, needs_in, needs_out) = len(rows), needs
    into_activation = g if needs_x or needs_in else 0
    assert count.products() == into_activation + g * needs_x + g * needs_in + g * needs_out


class Count(TorchDispatchMode):
    """Counts operators, matrix products apart from those of their operands that were copied."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def products(self) -> int:
        kinds = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "einsum")
        return sum(self.calls[kind] for kind in kinds)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("name", "merged"), [("joint", 4), ("ragged", 4), ("equal neighbours", 2), ("XL", 1)]
)
def test_gemms_are_one_a_segment_and_one_a_ring(
    name: str, merged: int, activation: Activation
) -> None:
    rows, widths = SEGMENTS[name]
    inputs = operands(rows, activation)
    with Count() as forward:
        y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    with Count() as backward:
        gradients(y, inputs)
    assert forward.products() == 2 * merged  # into the neurons, out of them
    assert backward.products() == 2 * merged + 2 * merged  # the same for dX; a ring of each dW
    assert not forward.calls["cat"] + backward.calls["cat"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["joint", "ragged", "no XL", "empty segments"])
def test_flops_match_the_formula(name: str, activation: Activation) -> None:
    rows, widths = SEGMENTS[name]
    inputs = operands(rows, activation)
    with FlopCounterMode(display=False) as forward:
        y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    with FlopCounterMode(display=False) as backward:
        gradients(y, inputs)
    activated = sum(r * m for r, m in zip(rows, widths, strict=True))
    expected = activated * (INPUTS[activation] + 1) * 2 * D
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_beyond_the_widest_segment_get_zero_gradient(activation: Activation) -> None:
    inputs = operands((3, 4), activation)
    y = nested_ffn(*inputs, rows=(3, 4), widths=(10, 6), activation=activation)
    _, d_in, d_out = gradients(y, inputs)
    assert (d_in[10:] == 0).all() and (d_out[10:] == 0).all()
    assert (d_in[9] != 0).all() and (d_out[9] != 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_order_matches_without_gradients_and_is_refused_with_them(
    activation: Activation,
) -> None:
    rows, widths = (3, 2, 0, 4, 1), (6, 24, 3, 12, 12)
    inputs = operands(rows, activation)
    with torch.no_grad():
        y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    torch.testing.assert_close(y, separate_passes(*inputs, rows, widths).detach())
    frozen = [operand.detach() for operand in inputs]
    y = nested_ffn(*frozen, rows=rows, widths=widths, activation=activation)
    torch.testing.assert_close(y, separate_passes(*inputs, rows, widths).detach())
    with pytest.raises(ValueError, match=r"\[6, 24, 3, 12, 12\] must not increase"):
        nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_operands_match_contiguous_ones(activation: Activation) -> None:
    rows, widths = SEGMENTS["ragged"]
    x, w_in, w_out = operands(rows, activation)
    strided = x.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    for inputs in ((x, w_in, w_out), (strided, w_in, w_out)):
        y = nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
        expected = separate_passes(*inputs, rows, widths)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous()  # collectives want it so
        # the gradient of a sum has no strides at all
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_matches_eager(activation: Activation) -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, activation)

    def run(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return nested_ffn(2 * x, w_in, w_out, rows=rows, widths=widths, activation=activation)

    eager = run(*inputs)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, inputs), gradients(eager, inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_checkpointed_matches_eager(activation: Activation) -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, activation)

    def run(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return nested_ffn(2 * x, w_in, w_out, rows=rows, widths=widths, activation=activation)

    again = checkpoint(run, *inputs, use_reentrant=False)
    torch.testing.assert_close(gradients(again, inputs), gradients(run(*inputs), inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_are_whole_weights_and_ragged_pre_activations(activation: Activation) -> None:
    rows, widths = SEGMENTS["ragged"]
    inputs = operands(rows, activation)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nested_ffn(*inputs, rows=rows, widths=widths, activation=activation)
    activated = sum(r * m for r, m in zip(rows, widths, strict=True))
    assert sorted(t.numel() for t in saved) == sorted(
        [*(t.numel() for t in inputs), INPUTS[activation] * activated]
    )
    for weight in inputs[1:]:
        assert any(t.data_ptr() == weight.data_ptr() and t.shape == weight.shape for t in saved)


def test_second_backward_pass_repeats_and_double_backward_is_refused() -> None:
    rows, widths = SEGMENTS["joint"]
    inputs = operands(rows, "swiglu")
    y = nested_ffn(*inputs, rows=rows, widths=widths, activation="swiglu")
    d_y = torch.ones_like(y).requires_grad_()
    first, second = (torch.autograd.grad(y, inputs, d_y, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="have no derivatives; call backward without create_gr"):
        torch.autograd.grad(y, inputs[:1], d_y, create_graph=True)


BAD = {
    "activation": ({"activation": "relu"}, "'relu' is unknown"),
    "rows do not sum": ({"rows": (3, 3)}, r"rows \[3, 3\].*the 7 rows of x"),
    "a row count is negative": ({"rows": (8, -1)}, r"rows \[8, -1\]"),
    "one width is missing": ({"widths": (4,)}, r"one count for each of the widths \[4\]"),
    "width above F": ({"widths": (25, 4)}, r"\[25, 4\] must lie in 1 to 24"),
    "width of 0": ({"widths": (4, 0)}, r"\[4, 0\] must lie in 1 to 24"),
    "x in three dimensions": ({"x": torch.zeros(1, 7, D)}, "flatten x"),
    "x too narrow": ({"x": torch.zeros(7, D - 1)}, r"got x \[7, 4\]"),
    "dtypes differ": ({"x": torch.zeros(7, D).half()}, r"x \(torch.float16\)"),
    "up weights are missing": ({"w_in": torch.zeros(NEURONS, D)}, r"w_in \[F, 2\*D\]"),
    "w_in of another F": ({"w_in": torch.zeros(3, 2 * D)}, r"w_in \[3, 10\]"),
    "w_out is transposed": ({"w_out": torch.zeros(D, NEURONS).t()}, "must be contiguous"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_named(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "x": torch.zeros(7, D),
        "w_in": torch.zeros(NEURONS, 2 * D),
        "w_out": torch.zeros(NEURONS, D),
        "rows": (3, 4),
        "widths": (8, 4),
        "activation": "swiglu",
    }
    nested_ffn(**call)
    with pytest.raises(ValueError, match=message):
        nested_ffn(**call | change)
