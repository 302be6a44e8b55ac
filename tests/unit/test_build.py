"""setup.py: what it says where a part of the build cannot be had, and where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def build(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in FREE}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


FREE = ("CXX", "TORCH_CUDA_ARCH_LIST", "MATFORMER_CUDA", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "matformer_dist").mkdir()
    (tmp_path / "matformer_dist" / "__init__.py").touch()
    return tmp_path


def test_without_a_compiler_the_package_builds_and_says_once_what_is_missing(
    checkout: Path,
) -> None:
    built = build(checkout, "build", PATH="")
    assert built.returncode == 0
    assert built.stderr.count("no C++ compiler (c++): installing without") == 1
    assert list((checkout / "build").rglob("__init__.py"))
    assert not list(checkout.rglob("*.so"))


def test_a_compiler_that_is_asked_for_and_not_there_is_an_error(checkout: Path) -> None:
    built = build(checkout, "build", CXX="no-such-compiler -m64")
    assert built.returncode == 1
    assert "CXX is 'no-such-compiler -m64', which is not there" in built.stderr
    assert "Traceback" not in built.stderr


def test_metadata_needs_neither_compiler_nor_torch(checkout: Path) -> None:
    (checkout / "torch.py").write_text("raise ImportError\n")
    told = build(checkout, "--version", PATH="")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("0.")


def test_a_failed_build_shows_the_compilers_own_error(checkout: Path) -> None:
    for source in checkout.glob("csrc/*/*.cpp"):
        source.write_text("")
    (checkout / "csrc" / "library.cpp").write_text('#error "broken on purpose"\n')
    built = build(checkout, "build_ext", "--inplace", MATFORMER_CUDA="0")
    assert built.returncode != 0
    assert "library.cpp:1:2: error:" in built.stdout + built.stderr
    assert "broken on purpose" in built.stdout + built.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_cuda_that_is_asked_for_and_cannot_be_built_is_an_error(checkout: Path) -> None:
    built = build(checkout, "build_ext", TORCH_CUDA_ARCH_LIST="9.0a")
    assert built.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST is '9.0a', which asks for the CUDA operators, but" in built.stderr
    assert "this torch is a CPU build" in built.stderr
    assert "Traceback" not in built.stderr
