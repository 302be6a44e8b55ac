"""DP 1 to 4 and TP 1 to 4 on gloo ranks: collectives and bytes of a step against the plan's, time.

python -m benchmarks.scaling

All ranks share this machine's cores, so the time is no measure of scaling: it says what a layout
costs in work and waiting, at the same global batch.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.machine import RESULTS, write_result
from matformer_dist.config import Config
from matformer_dist.parallel.topology import initialize
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.training.engine import Engine, build_model
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plan import case
from tests.distributed.traffic import Recorder, Traffic, foretold
from tests.distributed.training_cases import passes, synthetic_batches

VOCABULARY = 2048
STEPS = 5
SETTINGS = {
    "d_model": 128, "n_layers": 4, "d_ff": 512, "seq_len": 128, "micro_batch_size": 2,
    "global_batch_size": 8, "kind": "joint",
}  # fmt: skip
LAYOUTS = {
    "one rank": (1, {}),
    "data 2": (2, {}),
    "data 4": (4, {}),
    "data 4, ZeRO 2": (4, {"stage": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 4": (4, {"tensor": 4}),
    "tensor 4, sequence": (4, {"tensor": 4, "sequence": True}),
    "tensor 2 x data 2": (4, {"tensor": 2}),
}


def step(config: Config) -> tuple[Traffic, float]:
    """Collectives of the second step, and the median of the seconds of those behind it."""
    with Recorder() as recorder:
        topology = initialize(config.parallel.tensor)
        engine = Engine(config, build_model(config, VOCABULARY, topology), topology)
        batches = synthetic_batches(config, topology, VOCABULARY)
        seconds = []
        for number in range(STEPS + 2):
            begun = time.perf_counter()
            if number == 1:
                recorder.begin(topology)
            engine.train_step(batches, passes(config, engine, topology, number), 1e-3)
            if number == 1:
                sent = recorder.end()
            seconds.append(time.perf_counter() - begun)
    return sent, statistics.median(seconds[2:])


def main() -> None:
    rows = []
    print("| layout | collectives | of the plan | bytes | of the plan | ms a step |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (ranks, settings) in LAYOUTS.items():
        config = case(**{**SETTINGS, **settings})
        sent, seconds = run_ranks(ranks, step, config)[0]
        planned = foretold(PlannedRun(config, VOCABULARY, ranks // config.parallel.tensor, "cpu"))
        totals = [[sum(pair[i] for pair in of.values()) for of in (sent, planned)] for i in (0, 1)]
        rows.append(
            {
                "layout": name,
                "equal": sent == planned,
                "collectives": totals[0],
                "bytes": totals[1],
                "by_kind": {" over ".join(key): pair for key, pair in sent.items()},
                "seconds": seconds,
            }
        )
        print(
            f"| {name} | {totals[0][0]} | {totals[0][1]} | {totals[1][0]:,} | {totals[1][1]:,} | "
            f"{1e3 * seconds:.0f} |",
            flush=True,
        )
    unequal = [row["layout"] for row in rows if not row["equal"]]
    print(f"not as planned: {', '.join(map(str, unequal)) or 'none'}")
    write_result(RESULTS / "scaling_cpu.json", "cpu", ("torch", "deepspeed"), SETTINGS, rows=rows)


if __name__ == "__main__":
    main()
