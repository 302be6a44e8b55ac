"""Where models run, as users name it."""

from __future__ import annotations

from pathlib import Path

import torch

from matformer_dist.errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """cpu, cuda or cuda:N; None: the GPU, if there is one. UserError for what is not there."""
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} must be cpu, cuda or cuda:N, such as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = f"cuda:0 to cuda:{gpus - 1}" if gpus else "no GPU that torch can use"
        raise UserError(f"--device {name}: here is {there}; choose one that is there, or cpu")
    return device


def processor_name() -> str:
    """The CPU's model, as Linux names it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "")
