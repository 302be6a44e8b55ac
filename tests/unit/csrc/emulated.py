"""The CUDA kernels of csrc/ on a CPU: built with g++'s sanitizers and an emulator, and called.

build   compiles the .cu files with emulator.h for CUDA's headers to one program
Kernels runs a launcher in that program and gives back its arrays
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = Path(__file__).parents[3] / "csrc"
KERNELS = sorted(CSRC.rglob("*.cu"))
NUMBER_OF_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3}  # cuda/dtypes.h
FORWARD, BACKWARD = 0, 1  # orders of threads between two barriers; larger ones are random

FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fsanitize-sections=emulated_shared",  # else shared memory has no guards
    *("-DMATFORMER_EMULATED", f"-I{HERE}"),
]

Argument = Tensor | int | float | None


def build(folder: Path) -> Path:
    """The program, in `folder`; skips the test where this machine cannot build it."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there to build the emulated kernels")
    probe = folder / "probe.cpp"
    probe.write_text("#include <sanitizer/asan_interface.h>\nint main() { return 0; }\n")
    program = folder / "probe"
    tried = _run("g++", *FLAGS, str(probe), "-o", str(program))
    if tried.returncode or _run(str(program)).returncode:
        pytest.skip(f"g++ makes no program with sanitizers here: {tried.stderr[-300:]}")
    sources = [HERE / "run_kernels.cpp", *KERNELS]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(_compile, sources, objects)
    for each in compiled:
        assert each.returncode == 0, each.stderr
    linked = _run("g++", *FLAGS, *map(str, objects), "-o", str(folder / "kernels"))
    assert linked.returncode == 0, linked.stderr
    return folder / "kernels"


class Kernels:
    """The program's launchers: a process for each order of threads, until a call kills it.

    An array that is given here with its address off a multiple of 16 bytes is so there too.
    """

    def __init__(self, program: Path) -> None:
        self._program = program
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def call(self, launcher: str, *arguments: Argument, order: int) -> list[Tensor]:
        """What all arrays among the arguments are after the call, in their order."""
        error, arrays = self.call_for_error(launcher, *arguments, order=order)
        assert error == 0, f"{launcher} returns CUDA error {error}"
        return arrays

    def call_for_error(
        self, launcher: str, *arguments: Argument, order: int
    ) -> tuple[int, list[Tensor]]:
        process = self._processes.pop(order, None) or self._start(order)
        assert process.stdin and process.stdout
        process.stdin.write(launcher.encode() + b"\n" + b"".join(map(_written, arguments)))
        process.stdin.flush()
        given = [argument for argument in arguments if isinstance(argument, Tensor)]
        n_bytes = 8 + sum(array.nbytes for array in given)
        answer = bytearray(process.stdout.read(n_bytes))
        if len(answer) < n_bytes:
            process.communicate()
            said = self._log(order).read_text(errors="replace")
            raise AssertionError(f"{launcher} in order {order}:\n{said[-6000:]}")
        self._processes[order] = process
        (error,) = struct.unpack("=q", answer[:8])
        contents = torch.frombuffer(answer, dtype=torch.uint8)[8:].split([a.nbytes for a in given])
        return error, [
            content.clone().view(array.dtype).view_as(array)
            for content, array in zip(contents, given, strict=True)
        ]

    def close(self) -> None:
        for process in self._processes.values():
            process.communicate()
            assert process.returncode == 0, "a leak, or other trouble at the end"

    def _log(self, order: int) -> Path:
        return self._program.with_suffix(f".{order}.log")

    def _start(self, order: int) -> subprocess.Popen[bytes]:
        with self._log(order).open("wb") as log:
            return subprocess.Popen(
                [self._program, str(order)], stdin=PIPE, stdout=PIPE, stderr=log
            )


def _written(argument: Argument) -> bytes:
    if argument is None:
        return struct.pack("=qq", -1, 0)
    if not isinstance(argument, Tensor):
        return struct.pack("=d", argument)
    assert argument.is_contiguous()
    content = argument.flatten().view(torch.uint8).numpy().tobytes()
    return struct.pack("=qq", len(content), argument.data_ptr() % 16) + content


def _compile(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    return _run("g++", "-x", "c++", *FLAGS, "-c", str(source), "-o", str(to))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
