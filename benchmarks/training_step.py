"""A whole training step: joint in one pass against a loop of g passes, and per_sequence.

    python -m benchmarks.training_step [--dtype bfloat16] [--device cuda]

Side by side in one process, in turns: (a) `joint`, one pass over all granularities; (b) the
authors' way, for the same model: g passes of the whole network, one a granularity, gradients
added up, then the optimizer's step; (c) `per_sequence`, each sequence at one granularity; (d) a
step of XL alone. Each forward, loss, backward and AdamW step on the same b sequences. Printed:
median times, ratios of neighbouring runs, and peak memory, each kind's in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, keep_freed_memory, wait, write_result
from matformer_dist.config import ObjectiveConfig
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting, Segment
from matformer_dist.parallel.layers import Initializer
from matformer_dist.training.objective import Objective

KINDS = ("joint", "loop", "per_sequence", "xl")


@dataclass(frozen=True)
class Case:
    """One model and batch; d_ff is the whole FFN's neurons (SwiGLU)."""

    d_model: int
    n_layers: int
    d_ff: int
    vocab_size: int
    sequences: int
    seq_len: int


CASES = (
    Case(256, 4, 1024, 8192, 8, 128),
    Case(256, 4, 1024, 8192, 8, 512),
    Case(512, 4, 2048, 8192, 8, 256),
    Case(512, 4, 2048, 32768, 8, 128),
)


class Stepper:
    """A model, its optimizer, one batch, and the passes that each kind of step runs."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        nesting = Nesting.from_fractions(case.d_ff, ["1/8", "1/4", "1/2", 1])
        model = LanguageModelConfig(
            d_model=case.d_model,
            n_layers=case.n_layers,
            n_heads=case.d_model // 64,
            d_ff=case.d_ff,
            max_seq_len=case.seq_len,
        )
        nestings = [nesting] * case.n_layers
        self.model = MatLM(model, nestings, case.vocab_size, Initializer(0)).to(device, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        shape = (case.sequences, case.seq_len + 1)
        ids = torch.randint(0, case.vocab_size, shape, device=device)
        self.tokens, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        joint = Objective(ObjectiveConfig(kind="joint"), nesting, case.n_layers, 0)
        dealt = Objective(ObjectiveConfig(kind="per_sequence"), nesting, case.n_layers, 0)
        self.passes = {
            "joint": [joint.plan(0, 0, 1, case.sequences)],
            "loop": [
                alone(Segment(submodel, case.sequences), 1 / len(nesting))
                for submodel in nesting.uniforms(case.n_layers)
            ],
            "per_sequence": [dealt.plan(0, 0, 1, case.sequences)],
            "xl": [alone(Segment(nesting.uniforms(case.n_layers)[0], case.sequences), 1.0)],
        }

    def step(self, kind: str) -> Tensor:
        """One optimizer step; returns the loss."""
        total = self.backward(kind)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def backward(self, kind: str) -> Tensor:
        """Forward and backward passes of a step; returns the loss."""
        total = torch.zeros((), device=self.tokens.device)
        for plan in self.passes[kind]:
            loss, _ = self.model(self.tokens, self.targets, plan)
            loss.backward()
            total += loss.detach()
        return total

    def check(self) -> None:
        """Raise unless joint and loop have the same loss and gradients, to rounding."""
        found = {}
        for kind in ("loop", "joint"):
            loss = self.backward(kind).view(1)
            gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            found[kind] = {"loss": loss, "gradients": torch.cat(gradients)}
            self.optimizer.zero_grad()
        parameter = next(self.model.parameters())
        allowed = 1e-5 if parameter.dtype == torch.float32 else 0.02
        for name, want in found["loop"].items():  # apart: the loss is the larger by far
            want = want.double()
            error = float((found["joint"][name] - want).norm() / want.norm())
            if not error <= allowed:
                raise RuntimeError(f"joint and loop: {name} differ by {error:.1e}")

    def seconds(self, kind: str) -> float:
        wait(self.tokens.device)
        begun = time.perf_counter()
        self.step(kind)
        wait(self.tokens.device)
        return time.perf_counter() - begun


def alone(segment: Segment, weight: float) -> Pass:
    """One granularity's sequences, as a pass of the authors' loop."""
    return Pass((segment,), False, (weight,), (0.0,), (0.0,))


def measure(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each kind, and medians of the ratios of neighbouring runs."""
    stepper = Stepper(case, device, dtype)
    stepper.check()
    for kind in KINDS:
        stepper.step(kind)  # warm-up
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            times[kind].append(stepper.seconds(kind))

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    return {
        **asdict(case),
        "ms": {kind: 1e3 * statistics.median(times[kind]) for kind in KINDS},
        "joint_to_loop": ratio("joint", "loop"),
        "per_sequence_to_joint": ratio("per_sequence", "joint"),
        "joint_to_xl": ratio("joint", "xl"),
        "peak_mib": {kind: peak_mib(case, kind, device, dtype) for kind in KINDS},
    }


def peak_mib(case: Case, kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """Peak memory of a few steps of one kind; on a CPU, of a process that does nothing else."""
    if device.type == "cuda":
        stepper = Stepper(case, device, dtype)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            stepper.step(kind)
        return torch.cuda.max_memory_allocated(device) / 2**20
    words = [
        sys.executable,
        "-m",
        "benchmarks.training_step",
        "--peak",
        kind,
        json.dumps(asdict(case)),
        "--dtype",
    ]
    name = str(dtype).removeprefix("torch.")
    done = subprocess.run([*words, name], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(kind: str, case: Case, dtype: torch.dtype) -> None:
    """The memory that steps add to a process that has made the model and its optimizer's states."""
    stepper = Stepper(case, torch.device("cpu"), dtype)
    with torch.no_grad():
        for parameter in stepper.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    stepper.optimizer.step()
    stepper.optimizer.zero_grad()
    before = _resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        stepper.step(kind)
    print((_resident_kib("VmHWM") - before) / 1024)


def _resident_kib(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    if arguments.peak:
        kind, case = arguments.peak
        print_peak(kind, Case(**json.loads(case)), dtype)
        return
    keep_freed_memory()
    rows = []
    print("| d | layers | d_ff | V | b x s | joint ms | loop ms | joint/loop | per_seq/joint |"
          " joint/XL | MiB joint | MiB loop | MiB per_seq | MiB XL |")  # fmt: skip
    print("|" + "---|" * 14)
    for case in CASES:
        row = measure(case, device, dtype, arguments.repeats)
        rows.append(row)
        ms, mib = row["ms"], row["peak_mib"]
        print(
            f"| {case.d_model} | {case.n_layers} | {case.d_ff} | {case.vocab_size} "
            f"| {case.sequences} x {case.seq_len} | {ms['joint']:.0f} | {ms['loop']:.0f} "
            f"| {row['joint_to_loop']:.2f} | {row['per_sequence_to_joint']:.2f} "
            f"| {row['joint_to_xl']:.2f} | {mib['joint']:.0f} | {mib['loop']:.0f} "
            f"| {mib['per_sequence']:.0f} | {mib['xl']:.0f} |",
            flush=True,
        )
    settings = {
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
    }
    path = arguments.output or RESULTS / f"training_step_{arguments.dtype}_{device.type}.json"
    write_result(path, str(device), ("torch",), settings, results=rows)


if __name__ == "__main__":
    main()
