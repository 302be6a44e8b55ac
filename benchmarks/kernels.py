"""The compiled kernels as a share of what memory can do, and the GEMMs beside them:

    python -m benchmarks.kernels [--device cuda] [--dtype bfloat16] [--only kernels]

`kernels`: each moves little but its operands, so it is as good as its bandwidth. Counted are the
bytes that must move (every logit and activation once each way; a student's second look at its
teacher's row is the kernel's own affair), compared with a plain copy of `--copy-mib` that takes
turns with the kernel. Above 1 is possible: a copy writes as much as it reads. A CPU also
reads what it is about to write, which is not counted; it has no narrower gradients and no fp16.

    chunk_statistics            logits [g, c, V] -> 7 numbers a row
    chunk_gradient_             logits become their gradient: fp32 in place; fp32 packed into the
                                narrow dtype, as in training; in the narrow dtype all through
    nested_activation           h [N, k] -> act [N]
    nested_activation_backward  h, d_act -> act, d_h, four widths in one launch

`gemms`: the two forward GEMMs of the nested FFN, one cuBLAS call a granularity and GEMM (`ours`),
against one GEMM of the same FLOPs (`one`: the mean width for all rows), and torch._grouped_mm.
That takes groups which differ in one dimension only, of operands that lie side by side:

    into the neurons    x_i [R_i, D] w_in[:m_i]^T: groups differ in R_i and in m_i
    out of them         act_i [R_i, m_i] w_out[:m_i]: likewise, m_i being what is summed over

Where all R_i are equal (joint, and per_sequence that deals evenly) the first is its 3d x 2d case
and the second its 2d x 2d case, in bf16 and with the prefixes of the weights copied side by side
(`copies`, once a step and layer) and activations of all granularities in one row. Rows that differ
from granularity to granularity cannot be said at all, and are not measured.

`device` is what the GPU is busy with, from a CUDA graph of many passes; `eager` includes launches
by the host. Prints tables and writes them as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, keep_freed_memory, write_result
from matformer_dist.nesting import Nesting
from matformer_dist.ops import native

FRACTIONS = ("1/8", "1/4", "1/2", "1")
GEMM_ROWS = (256, 512, 1024, 2048, 4096, 8192)
GEMM_SIZES = ((1024, 4096), (2048, 8192))
PASSES = 20  # of one CUDA graph
Work = Callable[[], object]


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
        keep_freed_memory()
    sections: dict[str, list[dict[str, Any]]] = {}
    if args.only != "gemms":
        sections["kernels"] = measure_kernels(args)
    if args.only != "kernels":
        sections["gemms"] = measure_gemms(args)
    settings = {
        "operators": native.describe(torch.device(args.device)),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "copy_mib": args.copy_mib,
        "fractions": FRACTIONS,
    }
    path = args.output or RESULTS / f"kernels_{args.dtype}_{args.device.partition(':')[0]}.json"
    write_result(path, args.device, ("torch",), settings, **sections)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--only", choices=["kernels", "gemms"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1, help="time for each line")
    parser.add_argument("--copy-mib", type=int, help="default: 1024 on CUDA, 256 on a CPU")
    parser.add_argument("--tokens", type=int, help="c, default: 1024 on CUDA, 128 on a CPU")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rows", type=int, help="of each width, default: 4096 on CUDA, 512")
    parser.add_argument("--d-ff", type=int, default=8192)
    parser.add_argument("--gemm-rows", type=int, nargs="+", default=GEMM_ROWS)
    parser.add_argument("--gemm-sizes", type=size, nargs="+", default=GEMM_SIZES, help="D:d_ff")
    parser.add_argument("--output", type=Path, help="JSON; default: in benchmarks/results/")
    args = parser.parse_args()
    args.copy_mib = args.copy_mib or (1024 if on_cuda(args) else 256)
    args.tokens = args.tokens or (1024 if on_cuda(args) else 128)
    args.rows = args.rows or (4096 if on_cuda(args) else 512)
    if args.device.partition(":")[0] not in native.devices():
        parser.error(native.FAULT or f"no compiled operators for {args.device} were built")
    return args


def size(text: str) -> tuple[int, int]:
    d_model, d_ff = text.split(":")
    return int(d_model), int(d_ff)


def seconds_of(work: Work, device: str) -> float:
    """What `device` spends on `work`."""
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    torch.cuda.synchronize()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def in_turns(works: dict[str, Work], args: argparse.Namespace, before: Work) -> dict[str, float]:
    """Median seconds of each; `before` is called before each, untimed."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():  # warm-up
        before()
        work()
    deadline = time.perf_counter() + args.seconds
    count = 0
    while count < 5 or (time.perf_counter() < deadline and count < 500):
        for name, work in works.items():
            before()
            times[name].append(seconds_of(work, args.device))
        count += 1
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass
class Case:
    """A kernel over operands, the bytes that it must move, and what restores the operands."""

    kernel: str
    operands: str
    byte_count: int
    work: Work
    before: Work = lambda: None

    def result(self, seconds: Mapping[str, float], copied: int) -> dict[str, Any]:
        reached, copy = self.byte_count / seconds["kernel"], copied / seconds["copy"]
        return {
            "kernel": self.kernel,
            "operands": self.operands,
            "bytes": self.byte_count,
            "ms": 1e3 * seconds["kernel"],
            "bytes_per_second": reached,
            "copy_bytes_per_second": copy,
            "of_copy": reached / copy,
        }


def measure_kernels(args: argparse.Namespace) -> list[dict[str, Any]]:
    source = torch.zeros(args.copy_mib << 20, dtype=torch.uint8, device=args.device)
    target = torch.ones_like(source)
    results = []
    print("| kernel | operands | MB | ms | GB/s | copy GB/s | of copy |\n|" + "---|" * 7)
    for case in kernel_cases(args):
        works: dict[str, Work] = {"kernel": case.work, "copy": lambda: target.copy_(source)}
        seconds = in_turns(works, args, case.before)
        found = case.result(seconds, 2 * source.numel())
        results.append(found)
        print(
            f"| {case.kernel} | {case.operands} | {case.byte_count / 1e6:.0f} | {found['ms']:.3f} "
            f"| {found['bytes_per_second'] / 1e9:.1f} "
            f"| {found['copy_bytes_per_second'] / 1e9:.1f} | {found['of_copy']:.2f} |",
            flush=True,
        )
    return results


def kernel_cases(args: argparse.Namespace) -> Iterator[Case]:
    """One after another, so that only one's operands live."""
    narrow = getattr(torch, args.dtype)
    dtypes = [d for d in (torch.float32, narrow) if args.device != "cpu" or d != torch.float16]
    for dtype in dtypes:
        yield statistics_case(args, dtype)
        for gradient in dtypes:
            if gradient == dtype or (dtype == torch.float32 and args.device != "cpu"):
                yield gradient_case(args, dtype, gradient)
    for k in (2, 1):
        for dtype in dtypes:
            yield forward_case(args, k, dtype)
            yield backward_case(args, k, dtype)


def chunk(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    """Logits and targets of four granularities, and what they are in words."""
    shape = (len(FRACTIONS), args.tokens)
    logits = torch.randn(*shape, args.vocab, device=args.device).to(dtype)
    targets = torch.randint(args.vocab, shape, device=args.device)
    return logits, targets, f"{list(logits.shape)} {short(dtype)}"


def statistics_case(args: argparse.Namespace, dtype: torch.dtype) -> Case:
    logits, targets, words = chunk(args, dtype)
    statistics_of = torch.ops.matformer_dist.chunk_statistics
    rows = targets.numel()
    return Case(
        "chunk_statistics",
        words,
        logits.nbytes + targets.nbytes + rows * 7 * 4,
        lambda: statistics_of(logits, targets, 0, 1.0, True, True),
    )


def gradient_case(args: argparse.Namespace, dtype: torch.dtype, gradient: torch.dtype) -> Case:
    logits, targets, words = chunk(args, dtype)
    ops = torch.ops.matformer_dist
    ranks = ops.chunk_statistics(logits, targets, 0, 1.0, True, True)[None]
    ones = torch.ones(targets.shape, device=args.device)
    original = logits.clone()
    rows = targets.numel()
    written = logits.numel() * gradient.itemsize + rows * (4 * 4 + 8)
    rest = (ranks, ones, ones, ones, 0, -100, 1.0, True, gradient)
    return Case(
        "chunk_gradient_",
        f"{words} -> {short(gradient)}",
        logits.nbytes + targets.nbytes + ranks.nbytes + 3 * ones.nbytes + written,
        lambda: ops.chunk_gradient_(logits, targets, *rest),
        lambda: logits.copy_(original),
    )


def forward_case(args: argparse.Namespace, k: int, dtype: torch.dtype) -> Case:
    h, _, _, words = activations(args, k, dtype)
    forward = torch.ops.matformer_dist.nested_activation
    return Case("nested_activation", words, h.nbytes + h.nbytes // k, lambda: forward(h))


def backward_case(args: argparse.Namespace, k: int, dtype: torch.dtype) -> Case:
    """What lies right of narrower segments is neither read nor written, so it does not count."""
    h, rows, widths, words = activations(args, k, dtype)
    d_act = torch.randn_like(h[:, 0])
    backward = torch.ops.matformer_dist.nested_activation_backward
    return Case(
        "nested_activation_backward",
        words,
        2 * (h.nbytes + d_act.nbytes),
        lambda: backward(h, d_act, rows, widths, True),
    )


def activations(
    args: argparse.Namespace, k: int, dtype: torch.dtype
) -> tuple[Tensor, list[int], list[int], str]:
    """Pre-activations, rows and widths of four granularities, and what they are in words."""
    widths = list(Nesting.from_fractions(args.d_ff, FRACTIONS).widths[::-1])
    rows = [args.rows] * len(widths)
    h = torch.randn(args.rows * sum(widths), k, device=args.device).to(dtype)
    kind = "swiglu" if k == 2 else "gelu"
    return h, rows, widths, f"{kind} {len(widths)} x {args.rows} rows {short(dtype)}"


def short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(dtype)[6:]]


class Gemms:
    """The forward GEMMs of a SwiGLU FFN in bf16, R rows of each of four widths; D d_model."""

    def __init__(self, d_model: int, d_ff: int, rows: int, device: str) -> None:
        self.rows, self.d_model = rows, d_model
        self.widths = list(Nesting.from_fractions(d_ff, FRACTIONS).widths[::-1])
        groups, total = len(self.widths), sum(self.widths)
        mean = total // groups

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5

        self.x, self.w_in, self.w_out = (
            draw(groups * rows, d_model), draw(2 * d_ff, d_model), draw(d_ff, d_model)
        )  # fmt: skip
        self.acts = [draw(rows, width) for width in self.widths]
        self.h = [
            act.new_empty(rows, 2 * width)
            for act, width in zip(self.acts, self.widths, strict=True)
        ]
        self.y = torch.empty_like(self.x)
        self.act_mean = draw(groups * rows, mean)
        self.h_mean = self.x.new_empty(groups * rows, 2 * mean)
        self.act_beside = torch.cat(self.acts, 1)  # [R, sum m_i]
        ends = torch.tensor(self.widths, device=device).cumsum(0)
        self.ends, self.double_ends = ends.int(), (2 * ends).int()
        self.copies()

    def copies(self) -> None:
        """Prefixes of the weights side by side, as the grouped calls want them."""
        self.w_in_beside = torch.cat([self.w_in[: 2 * width] for width in self.widths])
        self.w_out_beside = torch.cat([self.w_out[:width] for width in self.widths])

    def ours(self) -> None:
        for i, width in enumerate(self.widths):
            part = slice(i * self.rows, (i + 1) * self.rows)
            torch.mm(self.x[part], self.w_in[: 2 * width].t(), out=self.h[i])
            torch.mm(self.acts[i], self.w_out[:width], out=self.y[part])

    def one(self) -> None:
        mean = self.act_mean.shape[1]
        torch.mm(self.x, self.w_in[: 2 * mean].t(), out=self.h_mean)
        torch.mm(self.act_mean, self.w_out[:mean], out=self.y)

    def grouped(self) -> tuple[Tensor, Tensor]:
        x = self.x.view(len(self.widths), self.rows, self.d_model)
        h = torch._grouped_mm(x, self.w_in_beside.t(), offs=self.double_ends)
        y = torch._grouped_mm(self.act_beside, self.w_out_beside, offs=self.ends)
        return h, y

    def check(self) -> None:
        """Raise unless grouped computes what ours does."""
        self.ours()
        h, y = self.grouped()
        for got, want in ((h, torch.cat(self.h, 1)), (y.flatten(0, 1), self.y)):
            error = ((got - want).float().norm() / want.float().norm()).item()
            if not error <= 1e-2:
                raise RuntimeError(f"results of torch._grouped_mm differ by {error:.1e}")

    def flops(self) -> int:
        return 2 * self.rows * self.d_model * 3 * sum(self.widths)


def measure_gemms(args: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    print("| D | d_ff | rows of each | TFLOP/s ours | one / ours | grouped / ours "
          "| with copies | eager: one / ours | grouped / ours |\n|" + "---|" * 9)  # fmt: skip
    for d_model, d_ff in args.gemm_sizes:
        for rows in args.gemm_rows:
            gemms = Gemms(d_model, d_ff, rows, args.device)
            refused = ""
            works: dict[str, Work] = {"ours": gemms.ours, "one": gemms.one}
            try:
                gemms.check()
                works |= {"grouped": gemms.grouped, "copies": gemms.copies}
            except (AttributeError, NotImplementedError, RuntimeError) as error:
                refused = str(error).splitlines()[0]
            found: dict[str, Any] = {
                "d_model": d_model,
                "d_ff": d_ff,
                "rows_per_granularity": rows,
                "flops": gemms.flops(),
                "grouped_refused": refused,
                "eager_ms": pass_ms(works, args),
                "device_ms": pass_ms(graphs_of(works), args) if on_cuda(args) else None,
            }
            results.append(found)
            print(gemm_line(found), flush=True)
            if refused:
                print(f"torch._grouped_mm takes no part: {refused}")
    return results


def on_cuda(args: argparse.Namespace) -> bool:
    return bool(args.device.startswith("cuda"))


def pass_ms(works: dict[str, Work], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one of PASSES passes that follow each other."""

    def repeated(work: Work) -> Work:
        return work if isinstance(work, Replay) else lambda: [work() for _ in range(PASSES)]

    seconds = in_turns({n: repeated(w) for n, w in works.items()}, args, lambda: None)
    return {name: 1e3 * value / PASSES for name, value in seconds.items()}


class Replay:
    """PASSES passes as one CUDA graph: the host has no part in their time."""

    def __init__(self, work: Work) -> None:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            work()  # workspaces and handles are made before
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(PASSES):
                work()

    def __call__(self) -> None:
        self.graph.replay()


def graphs_of(works: dict[str, Work]) -> dict[str, Work]:
    return {name: Replay(work) for name, work in works.items()}


def gemm_line(found: dict[str, Any]) -> str:
    cells = [found[key] for key in ("d_model", "d_ff", "rows_per_granularity")]
    device, eager = found["device_ms"] or found["eager_ms"], found["eager_ms"]
    cells.append(f"{found['flops'] / device['ours'] / 1e9:.2f}")
    for times, names in ((device, ("one", "grouped", "with copies")), (eager, ("one", "grouped"))):
        for name in names:
            if name == "with copies" and "grouped" in times:
                ms = times["grouped"] + times["copies"]
            else:
                ms = times.get(name)
            cells.append("-" if ms is None else f"{ms / times['ours']:.2f}")
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
