"""Tests that need a GPU: skipped as a whole where there is none, or no CUDA operators."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# Before torch makes a cuBLAS handle: the setting under which cuBLAS repeats its sums bit for bit,
# also from several streams.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from matformer_dist.ops import native
from tests.gpu.device import CUDA


def _missing() -> str:
    if CUDA.type in native.devices() and (CUDA.type == "cpu" or torch.cuda.is_available()):
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device"
    fault = native.FAULT or "the library holds those for the CPU alone; build it where nvcc is"
    return f"the CUDA operators are not built: {fault}"


class _Needing(pytest.Module):
    """A module whose tests need the CUDA operators. It is imported either way."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        collected = list(super().collect())
        reason = _missing()
        if reason:
            pytest.skip(reason, allow_module_level=True)
        return collected


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = _Needing.from_parent(parent, path=module_path)
    return module


@pytest.fixture(autouse=True)
def _fp32_is_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Whatever reads what nobody wrote gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
