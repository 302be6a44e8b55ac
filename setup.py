"""Build of csrc/ to matformer_dist/_native.so; name and requirements stand in pyproject.toml.

    no C++ compiler              no library: the package runs on its plain torch operators
    C++ compiler                 the CPU operators
    + nvcc and a CUDA torch      the CUDA operators too; no GPU need be there

TORCH_CUDA_ARCH_LIST   architectures of the CUDA operators, such as "8.0;9.0a;10.0+PTX"; who sets it
                       wants them, so that it is an error where they cannot be built
MATFORMER_CUDA=0       leaves the CUDA operators out
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CUDA_ARCHITECTURES = "8.0+PTX;9.0a"  # PTX of 8.0 serves whatever comes later
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11
# A library whatever the Python: it holds no Python.
TO_EVERY_COMPILER = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
# Visibility: the stable ABI's types are hidden, and so is all of ours. Without the two of math,
# GCC makes no vectors of loops that compare.
TO_CXX = ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]

# Commands of setuptools that come to compiling, whoever gives them.
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

csrc = Path(__file__).parent / "csrc"


def say(text: str) -> None:
    print(f"matformer-dist: {text}", file=sys.stderr)


def sources(*endings: str) -> list[str]:
    """Sources that end so, in an order that does not depend on the file system."""
    found = (path for path in csrc.rglob("*") if path.name.endswith(endings))
    return sorted(path.relative_to(csrc.parent).as_posix() for path in found)


def find_toolkit() -> tuple[str, str]:
    """Folder and major version of the CUDA toolkit of the nvcc that is found; empty without one.

    nvcc itself is asked, because what lies on PATH may be a wrapper that lives elsewhere.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        return "", ""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", plan.stdout + plan.stderr)
    release = re.search(r"release (\d+)", version.stdout)
    return (os.path.realpath(top[1]), release[1]) if top and release else ("", "")


def fault_of_cuda(cuda_of_torch: str | None, toolkit: str, version: str) -> str:
    """Why the CUDA operators cannot be built; empty where they can."""
    if os.environ.get("MATFORMER_CUDA") == "0":
        return "MATFORMER_CUDA is 0"
    if cuda_of_torch is None:
        return "this torch is a CPU build"
    if not toolkit:
        return "no nvcc was found (on PATH or under CUDA_HOME)"
    if version != cuda_of_torch.split(".")[0]:
        return f"nvcc is of CUDA {version}, torch of CUDA {cuda_of_torch}"
    return ""


def native_library() -> dict[str, Any]:
    """setup()'s arguments for the library; none where it cannot be built."""
    if not COMPILING.intersection(sys.argv):
        return {}  # metadata alone, which needs no torch
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        if os.environ.get("CXX"):
            raise SystemExit(
                f"matformer-dist: error: CXX is {compiler!r}, which is not there. Name a C++ "
                "compiler that is, or unset CXX"
            )
        say("no C++ compiler (c++): installing without the native operators; the package runs on")
        say("plain torch, slower. To have them: install g++, then install again")
        return {}
    toolkit, version = find_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # read when torch's module is imported
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(
            "matformer-dist: error: torch must be installed before this package is built: pip "
            "install torch, then pip install --no-build-isolation ."
        ) from None
    flags = {"cxx": TO_EVERY_COMPILER + TO_CXX}
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    fault = fault_of_cuda(torch.version.cuda, toolkit, version)
    if fault and asked and os.environ.get("MATFORMER_CUDA") != "0":
        raise SystemExit(
            f"matformer-dist: error: TORCH_CUDA_ARCH_LIST is {asked!r}, which asks for the CUDA "
            f"operators, but {fault}. Mend that, or unset TORCH_CUDA_ARCH_LIST, or set "
            "MATFORMER_CUDA=0"
        )
    if not fault:
        architectures = asked or CUDA_ARCHITECTURES
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        said = ",".join(architectures.replace(";", " ").split())
        # USE_CUDA: torch's header declares what gives the current stream under that alone.
        flags["cxx"] = [*flags["cxx"], "-DUSE_CUDA", f"-DMATFORMER_CUDA_ARCHITECTURES={said}"]
        flags["nvcc"] = [*TO_EVERY_COMPILER, "-Xcompiler=-fvisibility=hidden"]
    make = cpp_extension.CppExtension if fault else cpp_extension.CUDAExtension
    of_cuda = sources("_cuda_binding.cpp", ".cu")
    used = [s for s in sources(".cpp", ".cu") if not fault or s not in of_cuda]
    say(f"building CPU operators alone: {fault}" if fault else "building CPU and CUDA operators")
    library = make(
        "matformer_dist._native",
        used,
        extra_compile_args=flags,
        py_limited_api=True,
        depends=sources(".h", ".cuh", ".inl"),
    )
    build = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [library], "cmdclass": {"build_ext": build}}


setup(**native_library())
