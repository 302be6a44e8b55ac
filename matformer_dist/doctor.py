"""`matformer doctor`: what is installed and built, and what would run. To paste in a bug report."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from matformer_dist.ops import native

_PACKAGES = ("matformer-dist", "torch", "deepspeed", "megatron-core", "transformers", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examine() -> Iterator[tuple[str, str]]:
    """(what, how it is with that) of every thing looked at."""
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    for package in _PACKAGES:
        yield package, _version(package)
    yield "GPUs", _gpus()
    yield "operators", native.FAULT or _built()
    yield "would run", "; ".join(f"on {device} {_would_run(device)}" for device in ("cpu", "cuda"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "no driver or device"
        return f"none ({why})"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (compute capability {major}.{minor})")
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def _built() -> str:
    cuda = native.cuda_architectures()
    return (
        f"compiled for CPU, of which this processor runs the "
        f"{torch.ops.matformer_dist.instruction_set()} version, and "
        f"{f'for CUDA {cuda}' if cuda else 'not for CUDA'}"
    )


def _would_run(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "nothing"
    where = torch.device(device)
    compiled = [dtype for dtype in _DTYPES if native.is_native("auto", where, dtype)]
    plain = [dtype for dtype in _DTYPES if dtype not in compiled]
    # Whatever the operands, logits are fp32.
    loss = "compiled" if torch.float32 in compiled else "plain torch"
    activation = ", ".join(
        f"{what} for {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
        for what, dtypes in (("compiled", compiled), ("plain torch", plain))
        if dtypes
    )
    return f"the loss {loss}, the activation {activation}"
