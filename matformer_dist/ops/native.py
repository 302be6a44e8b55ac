"""The compiled operators of csrc/, and which implementation runs where.

Every operator has a plain torch implementation, the reference, and compiled ones for CPU and CUDA
under the same arguments. `impl` of an operator chooses:

    auto        compiled where there is one for the device and dtype, else the reference; or what
                `prefer` said for the whole process
    native      compiled, or an error that says why there is none
    reference   plain torch

The library holds no Python and needs none: it registers its operators as torch.ops.matformer_dist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["auto", "native", "reference"]

_LIBRARY = Path(__file__).parents[1] / "_native.so"
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_INTERFACE = 2  # of csrc/library.cpp
_preferred: Implementation = "auto"


def _load() -> str:
    """Load the library; returns why it is not there, or nothing."""
    again = "pip install --no-build-isolation again"
    if not _LIBRARY.exists():
        return (
            f"{_LIBRARY} was not built, for want of a C++ compiler at installation or of an "
            f"installation; have g++, then {again}"
        )
    operators = torch.ops.matformer_dist
    try:
        torch.ops.load_library(_LIBRARY)
        interface = operators.interface()
    except (OSError, AttributeError, RuntimeError) as error:
        cause = error.__cause__ or error
        return f"{_LIBRARY} does not fit torch {torch.__version__} ({cause}); {again}"
    if interface != _INTERFACE:
        return f"{_LIBRARY} was left from an earlier version of this package; {again}"
    return ""


FAULT = _load()
"""Why there are no compiled operators; empty where there are."""


def devices() -> tuple[str, ...]:
    """Device types that have compiled operators: none, cpu, or cpu and cuda."""
    operator = "matformer_dist::chunk_statistics"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return () if FAULT else tuple(name for name in _DTYPES if has(operator, name.upper()))


def fault_of(device: torch.device) -> str:
    """Why a device has no compiled operators; empty where it has."""
    if FAULT or device.type in _DEVICES:
        return FAULT
    return (
        f"the compiled operators are those of {' and '.join(_DEVICES)} alone, not of "
        f"{device.type}; `matformer doctor` says more"
    )


def prefer(impl: Implementation) -> None:
    """What "auto" stands for in this process from now on."""
    global _preferred
    _preferred = impl


def is_native(impl: Implementation, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the compiled operator runs for operands on `device` of these dtypes.

    ValueError where `impl` is unknown, RuntimeError where it is "native" and there is none.
    """
    if impl not in get_args(Implementation):
        raise ValueError(
            f"impl is {impl!r}; it must be one of {', '.join(get_args(Implementation))}"
        )
    impl = _preferred if impl == "auto" else impl
    if impl == "reference":
        return False
    has_kernel = device.type in _DEVICES and all(d in _DTYPES[device.type] for d in dtypes)
    if impl == "native" and not has_kernel:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise RuntimeError(
            fault_of(device)
            or f"there is no compiled operator for {names} on {device.type}; use impl='auto'"
        )
    return has_kernel


def cuda_architectures() -> str:
    """What the CUDA operators were compiled for, such as "8.0+PTX, 9.0a"; empty without them."""
    return "" if FAULT else torch.ops.matformer_dist.cuda_architectures()


def describe(device: torch.device) -> str:
    """What "auto" stands for on a device in this process, in a few words."""
    if _preferred == "reference":
        return "plain torch, as asked for"
    fault = fault_of(device)
    if fault:
        return f"plain torch, slower: {fault}"
    if device.type == "cuda":
        return f"compiled (CUDA {cuda_architectures()})"
    return f"compiled ({torch.ops.matformer_dist.instruction_set()})"


_DEVICES = devices()


def _register_fakes() -> None:
    """What the operators return, without values: for torch.compile and the meta device."""

    @torch.library.register_fake("matformer_dist::chunk_statistics")
    def _(
        logits: Tensor,
        targets: Tensor,
        offset: int,  # noqa: ARG001
        temperature: float,  # noqa: ARG001
        distills: bool,  # noqa: ARG001
        find_best: bool,  # noqa: ARG001
    ) -> Tensor:
        return logits.new_empty(*targets.shape, 7, dtype=torch.float32)

    @torch.library.register_fake("matformer_dist::chunk_gradient_")
    def _(
        logits: Tensor,  # noqa: ARG001
        targets: Tensor,
        ranks: Tensor,  # noqa: ARG001
        ce: Tensor,
        z: Tensor,  # noqa: ARG001
        kl: Tensor,  # noqa: ARG001
        offset: int,  # noqa: ARG001
        ignore_index: int,  # noqa: ARG001
        temperature: float,  # noqa: ARG001
        distills: bool,  # noqa: ARG001
        gradient: torch.dtype | None,  # noqa: ARG001
    ) -> tuple[Tensor, Tensor]:
        return ce.new_empty(4, *targets.shape), targets.new_empty(targets.shape)

    @torch.library.register_fake("matformer_dist::nested_activation")
    def _(h: Tensor) -> Tensor:
        return h.new_empty(h.shape[0])

    @torch.library.register_fake("matformer_dist::nested_activation_backward")
    def _(
        h: Tensor, d_act: Tensor | None, rows: list[int], widths: list[int], wants_act: bool
    ) -> tuple[Tensor, Tensor]:
        n_rows, widest = sum(rows), max(widths, default=0)
        return (
            h.new_empty(n_rows if wants_act else 0, widest),
            h.new_empty(0 if d_act is None else n_rows, h.shape[1] * widest),
        )


if not FAULT:
    _register_fakes()
