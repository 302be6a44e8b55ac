"""Memory of a rank: what `matformer plan` foretells against what real CPU ranks allocate.

python -m benchmarks.memory

The cases are those of tests/distributed/test_plan.py, on one, two and four gloo ranks.
"""

from __future__ import annotations

from benchmarks.machine import RESULTS, write_result
from matformer_dist.planning.layout import PlannedRun
from matformer_dist.planning.memory import estimate_memory
from tests.distributed.ranks import run_ranks
from tests.distributed.test_plan import (
    ALONE,
    FOUR_TENSOR_RANKS,
    TWO_DATA_RANKS,
    TWO_TENSOR_RANKS,
    measure_all,
)

GROUPS = {
    "one rank": (1, ALONE),
    "two data-parallel ranks": (2, TWO_DATA_RANKS),
    "two tensor-parallel ranks": (2, TWO_TENSOR_RANKS),
    "four tensor-parallel ranks": (4, FOUR_TENSOR_RANKS),
}


def main() -> None:
    rows = []
    for group, (ranks, cases) in GROUPS.items():
        measured = run_ranks(ranks, measure_all, cases)
        for name, (config, vocab_size) in cases.items():
            run = PlannedRun(config, vocab_size, ranks // config.parallel.tensor, "cpu")
            planned = estimate_memory(run)
            found = max(rank[name].at_most for rank in measured)
            rows.append(
                {
                    "ranks": group,
                    "case": name,
                    "planned_bytes": planned.total_bytes,
                    "measured_bytes": found,
                    "ratio": planned.total_bytes / found,
                    "moment": planned.moment,
                }
            )
    print("| ranks | case | planned | measured | planned / measured | most is needed |")
    print("|---|---|---:|---:|---:|---|")
    for row in rows:
        print(
            f"| {row['ranks']} | {row['case']} | {row['planned_bytes'] / 1e6:.1f} | "
            f"{row['measured_bytes'] / 1e6:.1f} | {row['ratio']:.3f} | {row['moment']} |"
        )
    write_result(RESULTS / "memory_cpu.json", "cpu", ("torch", "deepspeed"), {}, rows=rows)


if __name__ == "__main__":
    main()
