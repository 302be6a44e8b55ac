"""The CUDA sources: that nvcc takes them without a warning, and that they know nothing of torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
KERNELS = sorted(CSRC.rglob("*.cu"))
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
OF_THE_TESTS = "emulator.h"


def included(file: Path) -> set[str]:
    """Names of all headers that a file includes from outside the sources, through those inside."""
    outside, seen, waiting = set(), set(), [file]
    while waiting:
        source = waiting.pop().resolve()
        if source in seen:
            continue
        seen.add(source)
        for bracket, name in INCLUDE.findall(source.read_text()):
            if bracket == '"' and name != OF_THE_TESTS:
                waiting.append(source.parent / name)
            else:
                outside.add(name)
    return outside


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_nvcc_compiles_without_a_warning(kernel: Path, tmp_path: Path) -> None:
    """For two architectures; unoptimised, which is twice as fast and warns of the same."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not there to compile the CUDA kernels")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    flags = ["-std=c++17", "-Xcicc=-O0", "-Xptxas=-O0", "-Werror=all-warnings", *targets]
    command = [nvcc, *flags, "-c", str(kernel), "-o", str(tmp_path / "kernel.o")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_kernels_include_nothing_of_torch(kernel: Path) -> None:
    """Else nvcc takes a minute for what takes seconds, and each torch needs another build."""
    headers = included(kernel)
    assert "cuda_runtime.h" in headers, f"only these found: {headers}"
    assert not [name for name in headers if name.startswith(("torch/", "ATen/", "c10/"))]


def test_reader_of_includes_sees_torch_where_it_is() -> None:
    bindings = sorted(CSRC.rglob("*_cuda_binding.cpp"))
    assert len(bindings) == len(KERNELS)
    for binding in bindings:
        assert any(name.startswith("torch/") for name in included(binding))
