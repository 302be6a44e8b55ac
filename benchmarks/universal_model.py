"""Training steps of whole configurations on one device, by DeepSpeed, as a run takes them:

    python -m benchmarks.universal_model [CONFIG ...] [--set KEY=VALUE ...] [--device cuda]

Ways, which take turns step by step:

    joint         one pass over all granularities
    loop          the authors' way for the same model: a pass a granularity, gradients added up
    masks         one pass whose FFNs work at full width on every row, activations multiplied by
                  0 or 1
    per_sequence  each sequence at one granularity
    xl            each sequence at the largest, as a model without a nest

joint, loop and masks have the same losses and gradients, which is checked, and take the same
micro-batch: the largest (a power of two) that the plan of joint fits into the device. loop is
measured at per_sequence's as well, the largest of its plan. Every step is of as many tokens, with
one optimizer step. TFLOP/s are by activated FLOPs, of the loop and of masks by those of joint,
which does the same. Memory is the allocator's peak against the plan's. Without CONFIG it takes the
paper's and the Llama-style 2.6B, for which it wants a GPU of 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import RESULTS, device_name, wait, write_result
from benchmarks.training_step import alone
from matformer_dist.config_file import load_config
from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.counting import flops_per_unit
from matformer_dist.models import nested_feed_forward
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Segment
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import Topology, initialize
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.machines import USABLE_SHARE, device_called
from matformer_dist.planning.memory import estimate_memory
from matformer_dist.planning.plan import IF_OPEN
from matformer_dist.training.engine import Engine
from matformer_dist.training.objective import Objective
from matformer_dist.training.setup import choose_operators

CONFIGS = Path(__file__).parents[1] / "launch" / "configs"
DEFAULT = (CONFIGS / "paper/2.6b.yaml", CONFIGS / "llama/2.6b-1gpu.yaml")


@dataclass(frozen=True)
class Way:
    """How a step's sequences are computed, and how many of them at once."""

    name: str
    micro_batch: int

    @property
    def objective(self) -> str:
        return "joint" if self.name in ("joint", "loop", "masks") else "per_sequence"


class Bench:
    """One configuration's model, engine and tokens; steps of any way."""

    def __init__(self, config: LanguageConfig, tokens: int, topology: Topology) -> None:
        assert config.model.vocab_size is not None
        self.config, self.topology = config, topology
        self.vocab_size = config.model.vocab_size
        self.sequences = tokens // config.training.seq_len
        self.submodels = config.granularities.uniforms(config.model.n_layers)[::-1]
        model = self._model()
        choose_operators(config, topology)
        # One sequence a micro-batch: DeepSpeed is told of other numbers of passes step by step.
        self.engine = Engine(self.planned(Way("per_sequence", 1)).config, model, topology)
        shape = (self.sequences, config.training.seq_len + 1)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(self.vocab_size, shape, generator=generator).to(topology.device)

    def _model(self) -> MatLM:
        """Filled on the device, where billions of normal numbers take no time."""
        nestings = [self.config.granularities] * self.config.model.n_layers
        with torch.device(self.topology.device):
            model = MatLM(
                self.config.model, nestings, self.vocab_size, Initializer(None),
                self.topology.tensor,
            )  # fmt: skip
        model.activation_checkpointing = self.config.training.activation_checkpointing
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, self.config.model.init_std)
        return model

    def planned(self, way: Way) -> PlannedRun:
        """As the run that takes such steps."""
        training = self.config.training.model_copy(
            update={"micro_batch_size": way.micro_batch, "global_batch_size": self.sequences}
        )
        kind = self.config.objective.model_copy(update={"kind": way.objective})
        config = self.config.model_copy(update={"training": training, "objective": kind})
        return PlannedRun(config, self.vocab_size, 1, self.topology.device.type)

    def largest_micro_batch(self, name: str, usable_bytes: float) -> int:
        size = self.sequences & -self.sequences
        while size > 1 and self._need(Way(name, size)) > usable_bytes:
            size //= 2
        return size

    def _need(self, way: Way) -> int:
        return estimate_memory(self.planned(way)).total_bytes

    def step(self, way: Way) -> float:
        """One optimizer step; returns the loss, weighted as joint's."""
        work = list(self._work(way))
        self.engine.accumulation = len(work)
        self.engine.deepspeed.set_train_batch_size(len(work))
        self.engine.deepspeed.micro_steps = 0  # counted on over steps, to know where one ends
        batches, passes = zip(*work, strict=True)
        masked = patch.object(nested_feed_forward, "nested_ffn", MaskedFFN())
        with masked if way.name == "masks" else nullcontext(), self.engine.clock.step():
            results = self.engine.train_step(iter(batches), iter(passes), lr=1e-6)
        losses = [
            torch.tensor(plan.ce_weights, device=found.device) @ (found[:, 0] / found[:, 3]).float()
            for plan, found in results
        ]
        return float(torch.stack(losses).mean())

    def _work(self, way: Way) -> Iterator[tuple[tuple[Tensor, Tensor], Pass]]:
        """(tokens and targets, pass) of every micro-batch; in the loop, of every granularity."""
        parts = self.ids.split(way.micro_batch)
        layers, nesting = self.config.model.n_layers, self.config.granularities
        settings = self.planned(way).config.objective
        objective = Objective(settings, nesting, layers, self.config.training.seed)
        for i, ids in enumerate(parts):
            batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            if way.name == "loop":
                for submodel in self.submodels:
                    yield batch, alone(Segment(submodel, len(ids)), 1.0)
            elif way.name == "xl":
                yield batch, alone(Segment(self.submodels[0], len(ids)), 1.0)
            else:
                yield batch, objective.plan(0, i, len(parts), len(ids))


class MaskedFFN:
    """In place of the nested FFN: the same values from full-width GEMMs and masks."""

    def __init__(self) -> None:
        self._masks: dict[Any, Tensor] = {}

    def __call__(
        self, x: Tensor, w_in: Tensor, w_out: Tensor, *, rows: Sequence[int],
        widths: Sequence[int], activation: str, **_: Any,
    ) -> Tensor:  # fmt: skip
        mask = self._mask(x, len(w_out), tuple(rows), tuple(widths))
        gate, *up = (F.linear(x, w) for w in w_in.split(x.shape[1], dim=1))
        act = F.silu(gate) * up[0] if activation == "swiglu" else F.gelu(gate)
        return (act * mask) @ w_out

    def _mask(
        self, x: Tensor, neurons: int, rows: tuple[int, ...], widths: tuple[int, ...]
    ) -> Tensor:
        key = rows, widths
        if key not in self._masks:
            mask = x.new_zeros(len(x), neurons)
            for segment, width in zip(mask.split(rows), widths, strict=True):
                segment[:, :width] = 1
            self._masks = {key: mask}
        return self._masks[key]


def check(bench: Bench, ways: Sequence[Way]) -> dict[str, tuple[float, float]]:
    """Loss and gradient norm of each; RuntimeError unless they are the same, to rounding.

    The steps between them change neither by much, as the learning rate is small.
    """
    allowed = 1e-4 if bench.config.training.precision == "fp32" else 0.02
    found = {}
    for way in ways:
        found[f"{way.name}, {way.micro_batch}"] = bench.step(way), bench.engine.grad_norm
    (loss, norm), *others = found.values()
    for other_loss, other_norm in others:
        if abs(other_loss / loss - 1) > allowed or abs(other_norm / norm - 1) > 5 * allowed:
            raise RuntimeError(f"not the same (loss, gradient norm): {found}")
    return found


def measure(bench: Bench, ways: Sequence[Way], repeats: int, peak: float | None) -> list[Any]:
    """A row for each way that fits: medians of its steps, which take turns."""
    device = bench.topology.device
    seconds: dict[Way, list[float]] = {}
    memory: dict[Way, int] = {}
    for way in ways:
        with _memory(device) as read:
            try:
                bench.step(way)
                bench.step(way)  # the optimizer's states are there
                seconds[way], memory[way] = [], read()
            except torch.OutOfMemoryError:
                print(f"{way.name}, micro-batch {way.micro_batch}: does not fit", flush=True)
                bench.engine.deepspeed.optimizer.zero_grad()
    parts: dict[Way, list[dict[str, float]]] = {way: [] for way in seconds}
    for _ in range(repeats):
        for way, taken in seconds.items():
            bench.engine.clock.take()
            taken.append(_timed(bench, way))
            parts[way].append(bench.engine.clock.take())
    return [
        _row(bench, way, taken, seconds, parts[way], memory[way], peak)
        for way, taken in seconds.items()
    ]


@contextmanager
def _memory(device: torch.device) -> Iterator[Any]:
    """Gives what reads the most bytes that were allocated since; 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device)


def _timed(bench: Bench, way: Way) -> float:
    wait(bench.topology.device)
    begun = time.perf_counter()
    bench.step(way)
    wait(bench.topology.device)
    return time.perf_counter() - begun


def _row(
    bench: Bench, way: Way, taken: list[float], all_seconds: dict[Way, list[float]],
    parts: list[dict[str, float]], memory: int, peak: float | None,
) -> dict[str, Any]:  # fmt: skip
    run = bench.planned(way)
    flops = 3 * run.forward_flops_per_step.total
    if way.name == "xl":
        widest, sample = bench.submodels[0], run.config.sample
        of_token = flops_per_unit(run.config.model, bench.vocab_size, widest, sample)
        flops = 3 * of_token * run.units_per_step
    middle = statistics.median(taken)
    loop = all_seconds.get(Way("loop", way.micro_batch), []) if way.objective == "joint" else []
    ratios = [a / b for a, b in zip(loop, taken, strict=False)]
    planned = estimate_memory(run) if way.name in ("joint", "per_sequence") else None
    return {
        "way": way.name,
        "micro_batch": way.micro_batch,
        "seconds": middle,
        "all_seconds": taken,
        "tokens_per_second": run.units_per_step / middle,
        "tflops_per_second": flops / middle / 1e12,
        "mfu": flops / middle / 1e12 / peak if peak else None,
        "loop_to_this": statistics.median(ratios) if ratios else None,
        "memory_bytes": memory or None,
        "planned_bytes": planned.total_bytes if planned else None,
        "planned": str(planned) if planned else None,
        "ms": {part: 1e3 * statistics.median(p[part] for p in parts) for part in parts[0]},
    }


def ways_of(bench: Bench, micro_batch: int | None) -> list[Way]:
    usable = 0.0
    if bench.topology.device.type == "cuda":
        memory = torch.cuda.get_device_properties(bench.topology.device).total_memory
        usable = USABLE_SHARE * memory
    joint = micro_batch or bench.largest_micro_batch("joint", usable)
    dealt = micro_batch or bench.largest_micro_batch("per_sequence", usable)
    ways = [Way(name, joint) for name in ("joint", "loop", "masks")]
    ways += [Way(name, dealt) for name in ("loop", "per_sequence", "xl")]
    return list(dict.fromkeys(ways))


def line(name: str, row: dict[str, Any]) -> str:
    def gib(size: int | None) -> str:
        return f"{size / 2**30:.1f}" if size else ""

    ratio, mfu = row["loop_to_this"], row["mfu"]
    measured, planned = row["memory_bytes"], row["planned_bytes"]
    return (
        f"| {name} | {row['way']} | {row['micro_batch']} | {row['seconds']:.3g} "
        f"| {row['tokens_per_second']:,.0f} | {row['tflops_per_second']:.4g} "
        f"| {f'{mfu:.1%}' if mfu else ''} | {f'{ratio:.2f}' if ratio else ''} "
        f"| {gib(measured)} | {gib(planned)} "
        f"| {f'{planned / measured:.3f}' if planned and measured else ''} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path, default=DEFAULT, metavar="CONFIG")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every configuration"
    )
    parser.add_argument("--tokens", type=int, default=32768, help="of a step; default: 32768")
    parser.add_argument("--micro-batch", type=int, help="of every way, instead of what fits")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of MFU; default: known GPUs' own")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    topology = initialize(1)
    device = topology.device
    print("| config | way | micro-batch | s a step | tokens/s | TFLOP/s | MFU | loop / this "
          "| GiB | planned | planned / measured |")  # fmt: skip
    print("|---|---|" + "---:|" * 9)
    results: dict[str, Any] = {}
    for path in arguments.configs:
        config = as_language(load_config(path, arguments.set, if_open=IF_OPEN), "the benchmark")
        known = device_called(device_name(str(device))) if device.type == "cuda" else None
        peak = arguments.peak_tflops or (
            known.peak_tflops(config.training.precision) if known else None
        )
        bench = Bench(config, arguments.tokens, topology)
        ways = ways_of(bench, arguments.micro_batch)
        name = "/".join(path.with_suffix("").parts[-2:])
        rows = measure(bench, ways, arguments.repeats, peak)
        for row in rows:
            print(line(name, row), flush=True)
        same = [way for way in ways if way.objective == "joint"]
        results[name] = {"rows": rows, "same": check(bench, same)}
        bench.engine.deepspeed.destroy()
        del bench
        gc.collect()
    path = arguments.output or RESULTS / f"universal_model_{device.type}.json"
    settings = {key: getattr(arguments, key) for key in ("set", "tokens", "repeats")}
    write_result(path, str(device), ("torch", "deepspeed"), settings, results=results)


if __name__ == "__main__":
    main()
