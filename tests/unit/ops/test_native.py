"""Which implementation runs, and what the compiled operators promise torch and refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from matformer_dist.ops import head_chunk, native
from tests.tolerance import assert_as_exact_as_plain
from tests.unit.ops.loss_problems import NATIVE

CPU = torch.device("cpu")
G, C, V = 3, 5, 37


@pytest.fixture(autouse=True)
def _preference_is_restored() -> Iterator[None]:
    yield
    native.prefer("auto")


def test_unknown_implementation_is_named() -> None:
    with pytest.raises(ValueError, match="impl is 'fast'; it must be one of auto, native, referen"):
        native.is_native("fast", CPU, torch.float32)  # type: ignore[arg-type]


@NATIVE
def test_compiled_operators_run_where_there_are_some() -> None:
    assert "cpu" in native.devices()
    assert native.describe(CPU).startswith("compiled (")
    for dtype in (torch.float32, torch.bfloat16):
        assert native.is_native("auto", CPU, dtype) and native.is_native("native", CPU, dtype)
        assert not native.is_native("reference", CPU, dtype)
    for device, dtype in ((CPU, torch.float64), (CPU, torch.float16), ("meta", torch.float32)):
        assert not native.is_native("auto", torch.device(device), dtype)
        with pytest.raises(RuntimeError, match=r"no compiled operator for float|not of meta"):
            native.is_native("native", torch.device(device), dtype)


@NATIVE
def test_a_process_may_prefer_the_reference() -> None:
    native.prefer("reference")
    assert not native.is_native("auto", CPU, torch.float32)
    assert native.is_native("native", CPU, torch.float32)
    assert native.describe(CPU) == "plain torch, as asked for"


def test_without_a_library_auto_is_the_reference_and_native_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "FAULT", "_native.so was not built, because ...")
    monkeypatch.setattr(native, "_DEVICES", ())
    assert not native.is_native("auto", CPU, torch.float32)
    assert native.devices() == () and native.describe(CPU).startswith("plain torch, slower: _nat")
    assert native.fault_of(CPU) == native.FAULT
    with pytest.raises(RuntimeError, match=r"_native\.so was not built"):
        native.is_native("native", CPU, torch.float32)


@NATIVE
def test_a_device_without_compiled_operators_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_DEVICES", ("cpu",))
    device = torch.device("cuda")
    assert "those of cpu alone, not of cuda" in native.fault_of(device)
    assert native.describe(device).startswith("plain torch, slower: the compiled operators are")
    with pytest.raises(RuntimeError, match="those of cpu alone"):
        native.is_native("native", device, torch.float32)


def test_a_library_that_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "_native.so")
    assert "was not built, for want of a C++ compiler" in native._load()
    (tmp_path / "_native.so").write_bytes(b"not a library")
    assert "does not fit torch" in native._load()
    assert "invalid ELF header" in native._load() or "file too short" in native._load()


@NATIVE
def test_a_library_of_an_earlier_version_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", native._INTERFACE + 1)
    assert "was left from an earlier version" in native._load()


def chunk(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (G, C), generator=generator)
    targets[:, 1] = -100
    weights = {name: torch.rand(G, C, generator=generator) for name in ("ce", "z", "kl")}
    logits = (torch.randn(G, C, V, generator=generator) * 4).to(dtype)
    return {"logits": logits, "targets": targets, **weights}


def both_passes(
    twins: Any, operands: dict[str, Tensor], gradient: torch.dtype | None, temperature: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers, results, best ids and gradient of a chunk."""
    logits, targets = operands["logits"].clone(), operands["targets"]
    numbers = twins.chunk_statistics(logits, targets, 0, temperature, True, True)
    results, best = twins.chunk_gradient_(
        logits, targets, numbers[None], operands["ce"], operands["z"], operands["kl"],
        0, -100, temperature, True, gradient,
    )  # fmt: skip
    return numbers.nan_to_num(neginf=0), results, best, logits  # -inf where nobody asks


@NATIVE
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunk_of_bf16_logits_is_as_exact_as_the_reference(temperature: float) -> None:
    operands = chunk(torch.bfloat16)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in operands.items()}
    got, plain, truth = (
        both_passes(twins, given, given["logits"].dtype, temperature)
        for twins, given in (
            (torch.ops.matformer_dist, operands),
            (head_chunk, operands),
            (head_chunk, wide),
        )
    )
    assert torch.equal(got[2], truth[2])
    for name, *three in zip(("numbers", "results", "gradient"), *(r[:2] + r[3:] for r in (
        got, plain, truth)), strict=True):  # fmt: skip
        assert_as_exact_as_plain(*three, floor_eps=4, what=name)


@NATIVE
def test_without_a_gradient_the_logits_stay() -> None:
    operands = chunk()
    *_, logits = both_passes(torch.ops.matformer_dist, operands, None)
    assert torch.equal(logits, operands["logits"])


@NATIVE
def test_operators_keep_torchs_contract() -> None:
    operands, operators = chunk(), torch.ops.matformer_dist
    logits, targets, *weights = operands.values()
    numbers = operators.chunk_statistics(logits, targets, 0, 1.0, True, True)
    h, d_act = torch.randn(14, 2), torch.randn(14)
    for operator, arguments in (
        (operators.chunk_statistics, (logits, targets, 0, 1.0, True, True)),
        (
            operators.chunk_gradient_,
            (logits, targets, numbers[None], *weights, 0, -100, 1.0, True, torch.float32),
        ),
        (operators.nested_activation, (h,)),
        (operators.nested_activation_backward, (h, d_act, [2, 0], [7, 3], True)),
        (operators.nested_activation_backward, (h, None, [2, 0], [7, 3], True)),
    ):
        torch.library.opcheck(operator.default, arguments)


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    operands = chunk()
    operands[name] = change(operands[name])
    return lambda: both_passes(torch.ops.matformer_dist, operands, torch.float32)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "logits in fp64": (_change("logits", Tensor.double), "logits is float64; on a CPU it must be"),
    "logits of two dimensions": (_change("logits", lambda t: t[0]), r"contiguous \[G, c, V\]"),
    "logits with gaps": (_change("logits", lambda t: t.transpose(0, 1)), r"contiguous \[G, c, V\]"),
    "targets in int32": (_change("targets", Tensor.int), "targets is int32; it must be int64"),
    "targets of another chunk": (
        _change("targets", lambda t: t[:, :2].contiguous()),
        "targets has size 2 in dimension 1; it must be 5",
    ),
    "weights in bf16": (_change("kl", Tensor.bfloat16), "kl is bfloat16; it must be float32"),
    "gradient in another dtype": (
        lambda: both_passes(torch.ops.matformer_dist, chunk(), torch.bfloat16),
        "the gradient must have the dtype of the logits",
    ),
    "temperature 0": (
        lambda: both_passes(torch.ops.matformer_dist, chunk(), None, 0.0),
        "temperature is 0",
    ),
    "h with three values": (
        lambda: torch.ops.matformer_dist.nested_activation(torch.zeros(4, 3)),
        r"contiguous \[N, 1\] \(GELU\) or \[N, 2\]",
    ),
    "rows that do not fit": (
        lambda: torch.ops.matformer_dist.nested_activation_backward(
            torch.zeros(4, 1), None, [2, 1], [2, 1], True
        ),
        "more neurons than the 4 of h",
    ),
    "rows without widths": (
        lambda: torch.ops.matformer_dist.nested_activation_backward(
            torch.zeros(4, 1), None, [2, 1], [2], True
        ),
        "hold 2 and 1 numbers",
    ),
    "negative rows": (
        lambda: torch.ops.matformer_dist.nested_activation_backward(
            torch.zeros(4, 1), None, [-2, 4], [2, 2], True
        ),
        "segment 0 has -2 rows of 2 neurons",
    ),
    "more rows than can be": (
        lambda: torch.ops.matformer_dist.nested_activation_backward(
            torch.zeros(0, 1), None, [2**62], [4], True
        ),
        "more neurons than the 0 of h",
    ),
    "d_act of another size": (
        lambda: torch.ops.matformer_dist.nested_activation_backward(
            torch.zeros(4, 1), torch.zeros(3), [2], [2], True
        ),
        "d_act has size 3 in dimension 0; it must be 4",
    ),
}


@NATIVE
@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_named_before_anything_runs(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
