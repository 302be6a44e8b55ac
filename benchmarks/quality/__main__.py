"""See benchmarks/quality/__init__.py."""

from __future__ import annotations

import argparse
import os

from benchmarks.quality import __doc__ as told
from benchmarks.quality import corpus, study
from benchmarks.quality.training import train_all

PARTS = {
    "independent": lambda: study.against_independent("1m"),
    "learning-rate": lambda: study.learning_rates("1m"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality",
        description=told,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run")
    run.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; else all")
    run.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    corpus.prepare()
    for part in arguments.parts or PARTS:
        train_all(PARTS[part](), arguments.jobs)


if __name__ == "__main__":
    main()
