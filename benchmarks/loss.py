"""The loss over a vocabulary, forward + backward, ours against what else there is:

    python -m benchmarks.loss [--device cuda] [--dtype bfloat16] [--kl both] [--ways ours naive]

Measured is the cross-entropy of g granularities on the same tokens, and (`KL` in the table) with
it the KL of each smaller one to XL, with gradients of hidden and weight. **tokens are those of
one granularity**: hidden has g times as many rows. The ways stand in benchmarks/loss_ways.py:

    naive                 all logits at once, torch's cross_entropy and kl_div, softmax in fp32
    ours, reference       matformer_dist.ops.multi_granularity_loss, compiled and in plain torch
    linear_cross_entropy  torch's own chunked one (since torch 2.13); no KL
    compiled              chunks under torch.utils.checkpoint, the whole under torch.compile
    liger                 Liger's fused linear cross-entropy, and fused linear JSD for the KL
    liger_distillation    Liger's chunked distillation loss; only with KL
    cce, quack            Cut cross-entropy without its filter, QuACK's chunked one; no KL
    floor                 the three bare GEMMs, which nobody who keeps no logits can do without

Who cannot take part is listed under the table with the reason. The adapters to libraries follow
their documented signatures; whichever did not run here is marked untested here, also in the JSON.
`compiled` is compiled anew for every cell, which takes longer the more chunks there are.

Correctness comes first: on a small problem with uneven chunks the loss and both gradients are
compared with naive in fp64 (relative error in the norm, per dtype), and at full size the loss and
the norms of the gradients with the first way's. A way that is wrong is not timed, and said to be.

The ways take turns within each repetition, and nobody always goes first; ratios are medians of
the ratios of single repetitions. `naive / way` above 1 is faster than naive; `of floor` is the
floor's time by the way's. On CUDA a turn begins with an empty allocator cache and an untimed
pass, so that none meets the blocks another left; on a CPU the process keeps the memory it freed,
which spares naive the page faults of its logits. `--fresh-memory` leaves glibc as it is, which is
what a plain program gets.

Memory is the peak of one warm pass beyond the operands, both gradients included (`MiB`), and
without their bytes (`less grads`). On CUDA it is max_memory_allocated less what was allocated
before. On a CPU each way has a process of its own, which makes the operands, runs one pass,
returns freed memory to the system, and then takes the peak resident set of a second pass less the
resident set before it (Linux only). Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.loss_ways import WAYS, Problem, Run, Unavailable
from benchmarks.machine import RESULTS, keep_freed_memory, write_result

SIZES = {
    "cpu": [(512, 32768)],
    "cuda": [(d, v) for d in (1024, 2048, 3072) for v in (32768, 131072, 262144)],
}
TOKENS = {"cpu": [512, 2048], "cuda": [1024, 2048, 8192]}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
ALLOWED = {"float32": 2e-5, "bfloat16": 0.02}  # relative error of loss and gradients
KL_WEIGHT = 1.0
LIBRARIES = (
    "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl",
)  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One cell of the table, for all ways."""

    tokens: int  # of each granularity
    d_model: int
    vocab_size: int
    granularities: int
    kl: bool
    dtype: str
    device: str

    def problem(self, spread: float = 1.0, chunk_tokens: int | None = None) -> Problem:
        """Random operands; `spread` is the standard deviation of the logits."""
        torch.manual_seed(0)
        g, d_model = self.granularities, self.d_model
        options: Any = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        hidden = torch.empty(g * self.tokens, d_model, **options).normal_(std=spread)
        weight = torch.empty(self.vocab_size, d_model, **options).normal_(std=d_model**-0.5)
        targets = torch.randint(self.vocab_size, (self.tokens,), device=self.device).repeat(g)
        kl = KL_WEIGHT if self.kl else 0.0
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        return Problem(*leaves, targets, g, kl, chunk_tokens)

    @property
    def gradient_bytes(self) -> int:
        rows = self.tokens * self.granularities + self.vocab_size
        return rows * self.d_model * getattr(torch, self.dtype).itemsize


def run_pass(run: Run, problem: Problem) -> torch.Tensor:
    """One forward and backward pass, gradients made anew; returns the loss."""
    problem.clear()
    loss = run()
    if loss.requires_grad:  # not so of the floor
        loss.backward()
    return loss.detach()


def attempt(work: Callable[[], T]) -> T | str:
    """What `work` returns, or the reason why it cannot."""
    reason = ""
    try:
        return work()
    except Unavailable as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # of a library that does not fit; said under the table
        first = (str(error).splitlines() or [""])[0]
        reason = "out of memory" if "can't allocate memory" in first else ""
        reason = reason or f"failed: {type(error).__name__}: {first[:200]}"
    release_memory()  # here, where the error no longer holds its frames
    return reason


def release_memory() -> None:
    """Give freed memory back to the system or the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def check(
    ways: Sequence[str], granularities: int, kl: bool, dtype: str, device: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Error of each way on a small problem; and who takes no part, and why."""
    problem = Case(128, 128, 2048, granularities, kl, dtype, device).problem(2.5, chunk_tokens=48)
    exact = problem.in_float64()
    want = [run_pass(WAYS["naive"](exact), exact), exact.hidden.grad, exact.weight.grad]
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}

    def error(name: str) -> float:
        loss = run_pass(WAYS[name](problem), problem)
        found = zip((loss, problem.hidden.grad, problem.weight.grad), want, strict=True)
        return max(_distance(got, exact) for got, exact in found)

    torch.compiler.reset()
    for name in ways:
        if name == "floor":  # computes no loss
            continue
        found = attempt(functools.partial(error, name))
        if isinstance(found, str):
            refused[name] = found
        elif found <= ALLOWED[dtype]:
            errors[name] = found
        else:
            refused[name] = f"wrong by {found:.1e} (allowed {ALLOWED[dtype]:.0e}), so not timed"
    return errors, refused


def _distance(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    assert want is not None
    if got is None:
        return math.inf
    return float((got.double() - want).norm() / want.norm())


def peak_bytes_cuda(run: Run, problem: Problem) -> int:
    """Memory of one warm pass beyond what is allocated, which are the operands."""
    problem.clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_pass(run, problem)
    return torch.cuda.max_memory_allocated() - before


def peak_bytes_cpu(name: str, case: Case) -> int:
    """The same, of a process that does nothing else."""
    words = [sys.executable, "-m", "benchmarks.loss", "--threads", str(torch.get_num_threads())]
    words += ["--peak", name, json.dumps(asdict(case))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise torch.OutOfMemoryError("the system ended the process")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [""])[-1])
    return int(done.stdout.split()[-1])


def print_peak(name: str, case: Case) -> None:
    """In a process of its own on a CPU: the resident set that a second pass adds, in bytes."""
    problem = case.problem()
    run = WAYS[name](problem)
    run_pass(run, problem)
    problem.clear()
    release_memory()
    before = _resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run_pass(run, problem)
    print(max(0, _resident_kib("VmHWM") - before) * 1024)


def _resident_kib(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))


class Cell:
    """The ways that can do one case, warm, with their memory; and why the others cannot."""

    def __init__(self, case: Case, ways: Sequence[str], refused: dict[str, str]) -> None:
        torch.compiler.reset()  # or its limit of recompilations would end in eager execution
        self.case = case
        self.problem = case.problem()
        self.left_out = dict(refused)
        self.runs: dict[str, Run] = {}
        self.peaks: dict[str, int] = {}
        self.expected: torch.Tensor | None = None
        for name in ways:
            if name in refused:
                continue
            reason = attempt(functools.partial(self.admit, name))
            self.problem.clear()
            release_memory()
            if reason:
                self.runs.pop(name, None)
                self.left_out[name] = reason

    def admit(self, name: str) -> str:
        """Make a way, run it, measure its memory; returns what is wrong with it, or nothing."""
        if self.case.device == "cpu":  # first, in a process that may die of it
            self.peaks[name] = peak_bytes_cpu(name, self.case)
        run = WAYS[name](self.problem)
        loss = run_pass(run, self.problem)
        wrong = "" if name == "floor" else self.compare(loss)
        if not wrong:
            self.runs[name] = run
            if self.case.device != "cpu":
                self.peaks[name] = peak_bytes_cuda(run, self.problem)
        return wrong

    def compare(self, loss: torch.Tensor) -> str:
        """Loss and norms of the gradients with those of the first way."""
        norms = [
            torch.linalg.vector_norm(x.grad, dtype=torch.float32)
            for x in (self.problem.hidden, self.problem.weight)
            if x.grad is not None
        ]
        found = torch.stack([loss.float(), *norms])
        if self.expected is None:
            self.expected = found
        error = float(((found - self.expected) / self.expected).abs().max())
        return "" if error <= ALLOWED[self.case.dtype] else f"wrong at this size by {error:.1e}"

    def time_ms(self, run: Run) -> float:
        cuda = self.case.device != "cpu"
        if cuda:
            torch.cuda.empty_cache()
            run_pass(run, self.problem)
        self.problem.clear()
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run_pass(run, self.problem)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        names = list(self.runs)
        times: dict[str, list[float]] = {name: [] for name in names}
        deadline = time.perf_counter() + args.seconds
        turn = 0
        while turn < args.repetitions or (time.perf_counter() < deadline and turn < 200):
            first = turn % max(1, len(names))  # nobody always goes first
            for name in names[first:] + names[:first]:
                found = attempt(functools.partial(self.time_ms, self.runs[name]))
                if isinstance(found, str):
                    self.left_out[name] = found
                    names.remove(name)
                else:
                    times[name].append(found)
            turn += 1

        def ratio(above: str, below: str) -> float | None:
            if above not in names or below not in names:
                return None
            pairs = zip(times[above], times[below], strict=True)
            return statistics.median(a / b for a, b in pairs)

        ways = {}
        for name in names:
            peak, naive_peak = self.peaks[name], self.peaks.get("naive")
            ways[name] = {
                "ms": statistics.median(times[name]),
                "min_ms": min(times[name]),
                "naive_to_way": ratio("naive", name),
                "ours_to_way": ratio("ours", name),
                "of_floor": ratio("floor", name),
                "extra_bytes": peak,
                "beyond_gradients_bytes": peak - self.case.gradient_bytes,
                "of_naive_memory": peak / naive_peak if naive_peak else None,
            }
        cell = asdict(self.case)
        cell.update(repetitions=turn, ways=ways, left_out=self.left_out)
        return cell


def print_cell(cell: dict[str, Any], refused: dict[str, str]) -> None:
    head = [cell["tokens"], cell["d_model"], cell["vocab_size"], "yes" if cell["kl"] else "no"]
    for name, way in cell["ways"].items():
        numbers = [f"{way['ms']:.1f}", _number(way["naive_to_way"]), _number(way["of_floor"])]
        mib = [f"{way[key] / 2**20:.0f}" for key in ("extra_bytes", "beyond_gradients_bytes")]
        line = [*head, name, *numbers, *mib, _number(way["of_naive_memory"])]
        print("| " + " | ".join(map(str, line)) + " |", flush=True)
    for name, reason in cell["left_out"].items():
        if name not in refused:  # those are listed once, under the table
            line = [*head, name, reason, *"–" * 5]
            print("| " + " | ".join(map(str, line)) + " |", flush=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def print_losses(cells: list[dict[str, Any]]) -> None:
    """Where another way is faster than ours."""
    for cell in cells:
        faster = [
            f"{name} ({way['ours_to_way']:.2f})"
            for name, way in cell["ways"].items()
            if name != "floor" and way["ours_to_way"] is not None and way["ours_to_way"] > 1
        ]
        if faster:
            where = f"{cell['tokens']} tokens, D {cell['d_model']}, V {cell['vocab_size']}"
            kl = "with" if cell["kl"] else "without"
            print(f"faster than ours at {where}, {kl} KL (ours / way): {', '.join(faster)}")


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        name, case = args.peak
        print_peak(name, Case(**json.loads(case)))
        return
    kind = torch.device(args.device).type
    if kind == "cpu":
        if not args.fresh_memory:
            keep_freed_memory()
    else:
        torch.cuda.set_device(torch.device(args.device).index or 0)
    dtype = args.dtype or DTYPES[kind]
    kls = {"both": [False, True], "with": [True], "without": [False]}[args.kl]
    checks = {kl: check(args.ways, args.granularities, kl, dtype, kind) for kl in kls}
    cases = [
        Case(tokens, d_model, vocab_size, args.granularities, kl, dtype, kind)
        for d_model, vocab_size in args.sizes or SIZES[kind]
        for tokens in args.tokens or TOKENS[kind]
        for kl in kls
    ]
    print("| tokens | D | V | KL | way | ms | naive / way | of floor | MiB | less grads "
          "| of naive's MiB |")  # fmt: skip
    print("|" + "---|" * 11)
    cells = []
    for case in cases:
        cells.append(Cell(case, args.ways, checks[case.kl][1]).measure(args))
        release_memory()
        print_cell(cells[-1], checks[case.kl][1])
    write(cells, checks, dtype, args)


def write(
    cells: list[dict[str, Any]],
    checks: dict[bool, tuple[dict[str, float], dict[str, str]]],
    dtype: str,
    args: argparse.Namespace,
) -> None:
    """What stands under the table, and the JSON."""
    print_losses(cells)
    record = {}
    for kl, (errors, refused) in checks.items():
        title = "with KL" if kl else "without KL"
        record[title] = {"errors": errors, "not_in_table": refused}
        print(f"{title}, largest error: {', '.join(f'{n} {e:.0e}' for n, e in errors.items())}")
        print(f"{title}, not in the table: {'; '.join(f'{n}: {r}' for n, r in refused.items())}")
    refusals = [refused for _, refused in checks.values()]
    untested = [
        name
        for name in args.ways
        if all(name in refused and not refused[name].startswith("wrong") for refused in refusals)
    ]
    print(f"untested here: {', '.join(untested) or 'none'}")
    settings = {
        "libraries": versions(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "fresh_memory": args.fresh_memory,
        "kl_weight": KL_WEIGHT,
        "allowed_error": ALLOWED[dtype],
        "checks": record,
        "untested_here": untested,
    }
    kind = torch.device(args.device).type
    path = args.output or RESULTS / f"loss_{dtype}_{kind}.json"
    write_result(path, args.device, (), settings, results=cells)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=list(ALLOWED), help="default: by device")
    parser.add_argument("--tokens", type=int, nargs="+", help="of each granularity")
    parser.add_argument("--sizes", type=size, nargs="+", help="D:V, for example 512:32768")
    parser.add_argument("--granularities", type=int, default=4)
    parser.add_argument("--kl", choices=["both", "with", "without"], default="both")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=10, help="of timing, each cell")
    parser.add_argument("--repetitions", type=int, default=5, help="at least, whatever they take")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--fresh-memory", action="store_true", help="see above; on a CPU")
    parser.add_argument("--output", type=Path, help="JSON; default: in benchmarks/results/")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    d_model, vocab_size = text.split(":")
    return int(d_model), int(vocab_size)


if __name__ == "__main__":
    main()
