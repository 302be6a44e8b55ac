"""A nested vision encoder and adaptive retrieval in a few minutes: `make demo-vision`.

scikit-learn's digits. The universal encoder is trained with three seeds, and beside it an encoder
of each width alone, for contrast: with one seed, or with --all-seeds with as many. Every step is a
command that works the same on a cluster; each is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from matformer_dist.config_file import load_config
from matformer_dist.demo import matformer, run_demo
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.topology import cpu_environment

CONFIG = Path("launch/configs/vision/digits.yaml")
SEEDS = (1, 2, 3)
EXTRACTED = (("M", "hf", "M-hf"), ("S:3,M:3", "timm", "S3-M3-timm"))


def main() -> None:
    """Train, evaluate, retrieve, extract, report; all in the run's directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all-seeds", action="store_true", help="of the encoders alone, too")
    alone_seeds = SEEDS if parser.parse_args().all_seeds else SEEDS[:1]
    begun = time.monotonic()
    config = load_config(CONFIG)
    root, nesting = config.run.dir, config.granularities
    nested = {f"nested-{seed}": [f"training.seed={seed}"] for seed in SEEDS}
    alone = {
        f"alone-{name}-{seed}": [
            f"training.seed={1000 * (i + 1) + seed}",  # an equal one would begin with equal weights
            f"model.d_ff={width}",
            "nesting.fractions=[1]",
            f"nesting.names=[{name}]",
        ]
        for seed in alone_seeds
        for i, (name, width) in enumerate(zip(nesting.names, nesting.widths, strict=True))
    }
    train_all(root, {**nested, **alone})
    run = root / f"nested-{SEEDS[0]}"
    others = [root / f"alone-{name}-{SEEDS[0]}" for name in nesting.names]
    matformer("evaluate", run, "--heuristic")
    matformer("retrieve", run, *(word for other in others for word in ("--independent", other)))
    for submodel, kind, name in EXTRACTED:
        directory = run / "submodels" / name
        shutil.rmtree(directory, ignore_errors=True)
        matformer("extract", run, "--submodel", submodel, "--format", kind, "--output", directory)
    matformer("report", run)
    show_accuracies(root, nesting, alone_seeds)
    print(f"\ndone in {time.monotonic() - begun:.0f} s; open {run / 'report.html'}")


def train_all(root: Path, runs: Mapping[str, list[str]]) -> None:
    """Each run by one process of one thread, as many at a time as there are cores."""
    cores = len(os.sched_getaffinity(0))
    environment = cpu_environment(cores)
    waiting = list(runs.items())
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < cores:
            name, overrides = waiting.pop(0)
            running.append((name, _start(root / name, overrides, environment)))
        for name, process in list(running):
            if process.poll() is None:
                continue
            running.remove((name, process))
            print(f"{name}: {_accuracies(root / name) if process.returncode == 0 else 'failed'}")
            if process.returncode:
                for _, other in running:
                    other.terminate()
                print((root / f"{name}.log").read_text(), file=sys.stderr)
                sys.exit(process.returncode)
        time.sleep(0.1)


def _start(
    run: Path, overrides: list[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "launch/train.py", "--config", str(CONFIG), f"run.dir={run}"]
    command += overrides
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _last_accuracies(run: Path) -> dict[str, float]:
    """On the test images, at the last step."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found: dict[str, float] = json.loads(lines[-1])["val_accuracy"]
    return found


def _accuracies(run: Path) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in _last_accuracies(run).items())


def show_accuracies(root: Path, nesting: Nesting, alone_seeds: Sequence[int]) -> None:
    """Of every seed, the universal encoder's granularities and encoders of their widths alone."""
    table = Table(
        "test accuracy",
        *(f"seed {seed}" for seed in SEEDS),
        "mean",
        *(f"alone, {seed}" for seed in alone_seeds),
        "mean, alone",
    )
    for name in nesting.names:
        nested = [_last_accuracies(root / f"nested-{seed}")[name] for seed in SEEDS]
        alone = [_last_accuracies(root / f"alone-{name}-{seed}")[name] for seed in alone_seeds]
        cells = [*nested, fmean(nested), *alone, fmean(alone)]
        table.add_row(name, *(f"{share:.2%}" for share in cells))
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    run_demo(main)
