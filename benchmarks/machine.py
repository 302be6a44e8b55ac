"""What the benchmarks share: the memory of a timed process, and how a result is written down."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matformer_dist.checkpoints.files import replace_file

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"


def keep_freed_memory() -> None:
    """Have glibc serve large buffers from memory that was freed before; no effect elsewhere.

    So does the CUDA allocator. By default glibc fetches every large buffer from the system anew,
    and on a virtual machine its page faults cost up to a tenth of the time of wide operators.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, in bytes
            libc.mallopt(option, 2**31 - 1)


def wait(device: torch.device) -> None:
    """For all work that a GPU was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's architecture and model."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    from matformer_dist.inference.device import processor_name

    return f"{platform.machine()}, {os.cpu_count()} cores, {processor_name()}".rstrip(", ")


def write_result(
    path: Path, device: str, packages: tuple[str, ...], settings: Mapping[str, Any], **rows: Any
) -> None:
    """Write one JSON file: how it was measured, then what."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.stem
    record = {
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": device_name(device),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        **settings,
        **rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written to {path}")
