"""GPUs, and which operators are compiled for what is here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from matformer_dist.doctor.finding import Finding, failure, note
from matformer_dist.ops import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accelerator() -> Iterator[Finding]:
    driver = _driver()
    if not torch.cuda.is_available():
        yield _without_gpu(driver)
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", f"{torch.version.cuda}, driver {driver or 'unknown'}, NCCL {nccl}")
    for i in range(torch.cuda.device_count()):
        yield _gpu(i)


def _without_gpu(driver: str) -> Finding:
    if torch.version.cuda is None:
        text = "none used: this torch is a CPU build"
        problem = (
            f"there is an NVIDIA driver ({driver}), but torch {torch.__version__} is a CPU build "
            "and will not use the GPU; install a CUDA build of torch"
        )
        return note("GPUs", text, problem) if driver else Finding("GPUs", text)
    if not driver:
        return Finding("GPUs", "none: no NVIDIA driver")
    return failure(
        "GPUs",
        "none that torch can use",
        f"there is an NVIDIA driver ({driver}), but torch, built for CUDA {torch.version.cuda}, "
        "finds no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES, and whether the driver is new "
        "enough for that CUDA",
    )


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    what = f"GPU {index}"
    text = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )
    if free < total / 2:
        return note(
            what,
            text,
            f"more than half of GPU {index}'s memory is taken already: "
            "nvidia-smi shows by which programs; end these, or set "
            "CUDA_VISIBLE_DEVICES to other GPUs",
        )
    return Finding(what, text)


def _driver() -> str:
    """The NVIDIA driver's version; empty without one."""
    path = Path("/proc/driver/nvidia/version")
    try:
        words = path.read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "of no version")


def operators() -> Iterator[Finding]:
    if native.FAULT:
        yield note(
            "operators",
            native.FAULT,
            f"no compiled operators, so plain torch runs, which is slower: {native.FAULT}",
        )
    elif torch.cuda.is_available() and not native.cuda_architectures():
        yield note(
            "operators",
            _built(),
            "operators are not compiled for the GPU here, so plain "
            "torch runs on it, which is slower: have nvcc, then pip install "
            "--no-build-isolation again",
        )
    else:
        yield Finding("operators", _built())
    would = "; ".join(f"on {device} {_would_run(device)}" for device in ("cpu", "cuda"))
    yield Finding("would run", would)


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
