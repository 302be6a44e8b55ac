"""See benchmarks/quality/__init__.py."""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.quality import __doc__ as told
from benchmarks.quality.baseline import train_baselines
from benchmarks.quality.measures import measure_all
from benchmarks.quality.processes import FailedError
from benchmarks.quality.study import MODELS, RUNS, SEEDS
from benchmarks.quality.training import train_all

Part = Callable[[Sequence[int], int], None]  # told the seeds, and processes at a time
LOG = RUNS / "log.txt"


def _parts() -> dict[str, Part]:
    """In the order of what matters most."""

    def trained(name: str) -> Part:
        return lambda seeds, jobs: train_all(
            (run for run in MODELS[name]() if run.seed in seeds), jobs
        )

    def measured(name: str) -> Part:
        return lambda seeds, jobs: measure_all(name, seeds, jobs)

    def frontier(seeds: Sequence[int], jobs: int) -> None:
        trained("frontier")(seeds, jobs)
        measured("frontier")(seeds, jobs)

    return {
        "independent": trained("independent"),
        "longer": trained("longer"),
        "baseline": train_baselines,
        "consistency": measured("consistency"),
        "frontier": frontier,
        "continued": trained("continued"),
        "defaults": trained("defaults"),
        "larger": trained("larger"),
        "sensitivity": trained("sensitivity"),
        "longer-others": trained("longer-others"),
        "scaling": trained("scaling"),
        "gpu": trained("gpu"),  # where it is named
    }


def main() -> None:
    parts = _parts()
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality",
        description=told,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run")
    run.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; else all but gpu"
    )
    run.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, metavar="SEED")
    run.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    run.add_argument("--background", action="store_true", help=f"go on by itself; see {LOG}")
    commands.add_parser("draw")
    arguments = parser.parse_args()
    if arguments.command == "draw":
        from benchmarks.quality.drawing import draw

        draw()
        return
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose of {', '.join(parts)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be 1 or more")
    if "gpu" in arguments.parts and not torch.cuda.is_available():
        parser.error("the part gpu needs a GPU that torch finds")
    if arguments.background:
        _go_on_alone(arguments)
    else:
        sys.exit(_run(arguments, parts))


def _run(arguments: argparse.Namespace, parts: Mapping[str, Part]) -> int:
    """Every part, whether those before it failed or not; 1 where one did."""
    seeds = sorted(set(arguments.seeds))
    failed = False
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another study is at work in {RUNS}; wait for it, or end it", file=sys.stderr)
            return 1
        for name in arguments.parts or [name for name in parts if name != "gpu"]:
            print(f"== {name}", flush=True)
            try:
                parts[name](seeds, arguments.jobs)
            except FailedError as error:
                failed = True
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
    return int(failed)


def _go_on_alone(arguments: argparse.Namespace) -> None:
    """The same in a process that outlives this one and its terminal."""
    seeds = [str(seed) for seed in arguments.seeds]
    options = ["--seeds", *seeds, "--jobs", str(arguments.jobs)]
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality", "run", *arguments.parts, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    print(f"process {process.pid} runs; what it says is in {LOG}; kill -- -{process.pid} ends it")


if __name__ == "__main__":
    main()
