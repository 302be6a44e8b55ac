"""Nested FFN against a loop of passes and against masks, forward + backward:

    python -m benchmarks.nested_ffn [--activation gelu] [--dtype bfloat16] [--device cuda]

    nested  one call of matformer_dist.ops.nested_ffn for all granularities
    loop    one plain pass a granularity over prefix-sliced weights, gradients accumulated by
            autograd (the way of the paper's authors)
    masks   one plain pass of full-width GEMMs, activations multiplied by a 0/1 mask

Every way computes the same outputs and the same gradients of x and of all weights, which is
checked before it is timed. Weights of the plain ways lie as torch.nn.Linear keeps them, gate and
up apart. `joint`: every granularity sees all of `--rows` rows. `split`: they are dealt evenly to
the granularities, as in the per_sequence objective.

The three ways take turns within each repetition, so a busy machine disturbs all of them alike;
ratios are medians of the ratios of single repetitions. On a CPU the process keeps the memory that
it has freed, as the CUDA allocator does: fetching every large buffer from the system anew (the
default of glibc, `--fresh-memory`) costs about 0.1 of the nested and the masked time on a virtual
machine, and less of the loop's, whose buffers are smaller. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import RESULTS, keep_freed_memory, write_result
from matformer_dist.nesting import Nesting
from matformer_dist.ops.nested_ffn import nested_ffn

FRACTIONS = ("1/8", "1/4", "1/2", "1")
DEFAULT_SIZES = ((256, 1024), (512, 2048), (1024, 4096))
DEFAULT_ROWS = (256, 1024, 4096)
MAX_FLOPS_CPU = 4e11  # of masks, forward + backward; beyond it a repetition takes tens of seconds

Way = Callable[[], list[Tensor]]


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and not args.fresh_memory:
        keep_freed_memory()
    results, left_out = [], []
    print(
        "| rows | of each granularity | D | d_ff | layout | nested ms | loop ms | masks ms "
        "| of loop | of masks |"
    )
    print("|" + "---|" * 10)
    for d_model, d_ff in args.sizes:
        for n_rows in args.rows:
            for layout in ("joint", "split"):
                case = Case(d_model, d_ff, n_rows, layout, args)
                if args.device == "cpu" and case.mask_flops > MAX_FLOPS_CPU:
                    left_out.append(f"{n_rows} {layout} rows at {d_model} x {d_ff}")
                    continue
                results.append(case.measure(args.seconds))
                print(table_line(results[-1]), flush=True)
    if left_out:
        print(f"left out, too long on a CPU: {', '.join(left_out)}")
    write(results, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activation", choices=["swiglu", "gelu"], default="swiglu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 0: torch's own")
    parser.add_argument("--rows", type=int, nargs="+", default=DEFAULT_ROWS)
    parser.add_argument(
        "--sizes", type=size, nargs="+", default=DEFAULT_SIZES, help="D:d_ff, for example 512:2048"
    )
    parser.add_argument("--seconds", type=float, default=8, help="time for each line of the table")
    parser.add_argument("--fresh-memory", action="store_true", help="see above")
    parser.add_argument("--output", type=Path, help="JSON; default: in benchmarks/results/")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    d_model, d_ff = text.split(":")
    return int(d_model), int(d_ff)


class Case:
    """One line of the table: operands, and the three ways over them."""

    def __init__(
        self, d_model: int, d_ff: int, n_rows: int, layout: str, args: argparse.Namespace
    ) -> None:
        self.d_model, self.d_ff, self.n_rows, self.layout = d_model, d_ff, n_rows, layout
        self.activation = args.activation
        self.cuda = args.device.startswith("cuda")
        self.widths = Nesting.from_fractions(d_ff, FRACTIONS).widths[::-1]
        granularities = len(self.widths)
        share = n_rows if layout == "joint" else n_rows // granularities
        self.rows = (share,) * granularities
        options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        inputs = 2 if args.activation == "swiglu" else 1

        def operand(*shape: int) -> Tensor:
            return (torch.randn(*shape, **options) * d_model**-0.5).requires_grad_()

        self.projections = [operand(d_ff, d_model) for _ in range(inputs)]
        self.down = operand(d_model, d_ff)
        self.w_in = torch.cat([w.detach() for w in self.projections], 1).requires_grad_()
        self.w_out = self.down.detach().t().contiguous().requires_grad_()
        self.x = torch.randn(share * granularities, d_model, **options).requires_grad_()
        self.d_y = torch.randn_like(self.x)
        self.mask = torch.zeros(len(self.x), d_ff, **options)
        for segment, width in zip(self.mask.split(self.rows), self.widths, strict=True):
            segment[:, :width] = 1

    @property
    def mask_flops(self) -> float:
        return 3 * 2 * len(self.x) * self.d_model * self.d_ff * (len(self.projections) + 1)

    def activate(self, x: Tensor, width: int) -> Tensor:
        if self.activation == "gelu":
            return F.gelu(F.linear(x, self.projections[0][:width]))
        gate, up = self.projections
        return F.silu(F.linear(x, gate[:width])) * F.linear(x, up[:width])

    def nested(self) -> list[Tensor]:
        y = nested_ffn(
            self.x,
            self.w_in,
            self.w_out,
            rows=self.rows,
            widths=self.widths,
            activation=self.activation,
        )
        y.backward(self.d_y)
        return [y]

    def loop(self) -> list[Tensor]:
        outputs = []
        segments = zip(self.x.split(self.rows), self.d_y.split(self.rows), self.widths, strict=True)
        for x, d_y, width in segments:
            outputs.append(F.linear(self.activate(x, width), self.down[:, :width]))
            outputs[-1].backward(d_y)
        return outputs

    def masks(self) -> list[Tensor]:
        y = F.linear(self.activate(self.x, self.d_ff) * self.mask, self.down)
        y.backward(self.d_y)
        return [y]

    def results(self, way: Way) -> list[Tensor]:
        """Output and gradients of one pass, in the layout of torch.nn.Linear."""
        self.clear()
        y = torch.cat(way()).detach()
        if way == self.nested:
            assert self.w_in.grad is not None and self.w_out.grad is not None
            weights = [*self.w_in.grad.split(self.d_model, 1), self.w_out.grad.t()]
        else:
            weights = [w.grad for w in (*self.projections, self.down) if w.grad is not None]
        assert self.x.grad is not None
        return [y, self.x.grad, *weights]

    def clear(self) -> None:
        for operand in (self.x, self.w_in, self.w_out, self.down, *self.projections):
            operand.grad = None

    def check(self) -> None:
        """Raise unless the three ways give the same results, to the rounding of the dtype."""
        expected = self.results(self.masks)
        tolerance = 30 * torch.finfo(self.x.dtype).eps
        for way in (self.nested, self.loop):
            for got, want in zip(self.results(way), expected, strict=True):
                error = ((got - want).float().norm() / want.float().norm()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{way.__name__}: results differ by {error:.1e}")

    def time_ms(self, way: Way) -> float:
        self.clear()
        if self.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        way()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def measure(self, seconds: float) -> dict[str, object]:
        self.check()
        ways = (self.nested, self.loop, self.masks)
        repetitions: list[list[float]] = []
        deadline = time.perf_counter() + seconds
        while len(repetitions) < 5 or (time.perf_counter() < deadline and len(repetitions) < 200):
            turn = len(repetitions) % len(ways)  # nobody always goes first
            order = [(turn + i) % len(ways) for i in range(len(ways))]
            times = {i: self.time_ms(ways[i]) for i in order}
            repetitions.append([times[i] for i in range(len(ways))])
        nested, loop, masks = (statistics.median(times) for times in zip(*repetitions, strict=True))
        return {
            "rows_per_granularity": self.rows[0],
            "rows": len(self.x),
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "layout": self.layout,
            "nested_ms": nested,
            "loop_ms": loop,
            "masks_ms": masks,
            "nested_of_loop": statistics.median(n / l_ for n, l_, _ in repetitions),
            "nested_of_masks": statistics.median(n / m for n, _, m in repetitions),
            "repetitions": len(repetitions),
        }


def table_line(result: dict[str, object]) -> str:
    keys = ("rows", "rows_per_granularity", "d_model", "d_ff", "layout")
    cells = [result[key] for key in keys]
    cells += [f"{result[key]:.1f}" for key in ("nested_ms", "loop_ms", "masks_ms")]
    cells += [f"{result[key]:.2f}" for key in ("nested_of_loop", "nested_of_masks")]
    return "| " + " | ".join(map(str, cells)) + " |"


def write(results: list[dict[str, object]], args: argparse.Namespace) -> None:
    name = f"nested_ffn_{args.activation}_{args.dtype}_{args.device.partition(':')[0]}.json"
    settings = {
        "fresh_memory": args.fresh_memory,
        "threads": torch.get_num_threads(),
        "activation": args.activation,
        "dtype": args.dtype,
        "fractions": FRACTIONS,
    }
    path = args.output or RESULTS / name
    write_result(path, args.device, ("torch",), settings, results=results)


if __name__ == "__main__":
    main()
