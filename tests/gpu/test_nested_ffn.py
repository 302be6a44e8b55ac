"""nested_ffn on a GPU against plain FFNs, one a segment, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer_dist.ops.nested_ffn import Activation, nested_ffn
from tests.gpu.device import CUDA, every_dtype
from tests.tolerance import assert_as_exact_as_plain

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "gelu")
# name: (rows, widths), widest first
SEGMENTS = {
    "joint": ((65, 65, 65, 65), (512, 256, 128, 64)),
    "odd widths": ((33, 65, 16, 40), (301, 151, 33, 7)),
    "equal neighbours, empty ones": ((5, 0, 9, 4), (128, 128, 64, 8)),
    "one neuron": ((2, 3), (2, 1)),
    "more than one launch": ((2,) * 70, tuple(range(210, 0, -3))),
    "no rows": ((0, 0), (24, 6)),
}
Operands = list[Tensor]


def operands(
    rows: Sequence[int],
    widths: Sequence[int],
    activation: Activation,
    dtype: torch.dtype,
    biases: bool = False,
) -> Operands:
    """x, w_in, w_out and perhaps b_in, which need gradients, and the gradient of y; D is 48."""
    generator = torch.Generator().manual_seed(0)
    neurons, inputs = max(widths) + 3, 2 if activation == "swiglu" else 1
    shapes: list[tuple[int, ...]] = [(sum(rows), 48), (neurons, inputs * 48), (neurons, 48)]
    shapes += [(inputs * neurons,)] * biases + [(sum(rows), 48)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn[1] *= 0.2  # pre-activations of about 1
    *learning, d_y = (t.to(CUDA, dtype) for t in drawn)
    return [*(t.requires_grad_() for t in learning), d_y]


def separate_passes(operands: Operands, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
    x, w_in, w_out, *b_in = operands[:-1]
    ys = [x[:0]]
    for part, width in zip(x.split(list(rows)), widths, strict=True):
        gate, *up = w_in[:width].split(w_out.shape[1], dim=1)
        biases = b_in[0].view(len(w_in), -1)[:width].unbind(1) if b_in else (None, None)
        h = F.linear(part, gate, biases[0])
        act = F.silu(h) * F.linear(part, up[0], biases[1]) if up else F.gelu(h)
        ys.append(act @ w_out[:width])
    return torch.cat(ys)


def with_gradients(y: Tensor, operands: Operands) -> tuple[Tensor, ...]:
    *inputs, d_y = operands
    return y.detach(), *torch.autograd.grad(y, inputs, d_y, materialize_grads=True)


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@every_dtype
def test_output_and_gradients_are_as_exact_as_plain(
    dtype: torch.dtype,
    segments: tuple[tuple[int, ...], tuple[int, ...]],
    activation: Activation,
    biases: bool,
) -> None:
    rows, widths = segments
    inputs = operands(rows, widths, activation, dtype, biases)
    x, w_in, w_out, *b_in = inputs[:-1]
    y = nested_ffn(
        x, w_in, w_out, *b_in, rows=rows, widths=widths, activation=activation, impl="native"
    )  # fmt: skip
    plain = separate_passes(inputs, rows, widths)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    truth = separate_passes(wide, rows, widths)
    three = (with_gradients(y, inputs), with_gradients(plain, inputs), with_gradients(truth, wide))
    floor = 8 if dtype == torch.float32 else 1  # in fp32 the order of a GEMM's sums is the error
    names = ("y", "d x", "d w_in", "d w_out", "d b_in")[: len(inputs)]
    for name, *results in zip(names, *three, strict=True):
        assert_as_exact_as_plain(*results, floor_eps=floor, what=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("learning", [0, 1, 2])
def test_gradients_of_one_operand_match_those_of_all(learning: int, activation: Activation) -> None:
    rows, widths = SEGMENTS["odd widths"]
    inputs = operands(rows, widths, activation, torch.bfloat16)

    def run() -> Tensor:
        return nested_ffn(
            *inputs[:3], rows=rows, widths=widths, activation=activation, impl="native"
        )

    expected = with_gradients(run(), inputs)[1 + learning]
    for i, operand in enumerate(inputs[:3]):
        operand.requires_grad_(i == learning)
    (got,) = torch.autograd.grad(run(), inputs[learning], inputs[3])
    assert torch.equal(got, expected)


def test_operands_on_two_devices_are_refused() -> None:
    rows, widths = SEGMENTS["joint"]
    x, w_in, w_out, _ = operands(rows, widths, "swiglu", torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        nested_ffn(x.cpu(), w_in, w_out, rows=rows, widths=widths, activation="swiglu")
    with pytest.raises((ValueError, RuntimeError), match="device"):
        nested_ffn(x, w_in, w_out.cpu(), rows=rows, widths=widths, activation="swiglu")
