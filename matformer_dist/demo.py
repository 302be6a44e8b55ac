"""The main job in a few minutes on a small machine: `make demo`.

Corpus: the source of the Python standard library that runs this. Every step is a command that
works the same on a cluster; each is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from matformer_dist.config_file import load_config
from matformer_dist.config_language import as_language
from matformer_dist.errors import EXIT_USER_ERROR, UserError
from matformer_dist.evaluation.downstream.held_out import HELD_OUT
from matformer_dist.inference.generation import sample
from matformer_dist.parallel.topology import cpu_environment

CONFIG = Path("launch/configs/demo.yaml")
PROMPTS = ("def ", "class ", "import ")
EXTRACTED = (("M", "hf", "M-hf"), ("S:2,M:2", "native", "S2-M2-native"))
NOT_LIBRARY = ("site-packages", "test")
SCRIPTS = Path(sys.executable).parent


def main() -> None:
    """Prepare data, train, evaluate, extract, sample, report; all in the run's directory."""
    begun = time.monotonic()
    config = as_language(load_config(CONFIG), "the demo")
    run = config.run.dir
    ranks = config.parallel.tensor
    prepare_corpus(Path(config.data.train[0][1]))
    # Tensor-parallel ranks cannot share a GPU: with fewer GPUs than ranks, the demo runs on CPU.
    on_cpu = torch.cuda.device_count() < ranks
    show(
        [
            SCRIPTS / "deepspeed",
            "--quiet",
            "--num_gpus",
            ranks,
            "launch/train.py",
            "--config",
            CONFIG,
        ],
        cpu_environment(ranks) if on_cpu else None,
    )
    matformer("evaluate", run, "--heuristic", "--batches", 8)
    matformer("search", run, "--batches", 8, "--points", 12, "--rounds", 1, "--candidates", 2)
    matformer("speculate", run, "--draft", "S", "--draft", "M", "--new-tokens", 64)
    matformer("evaluate", run, "--tasks", "stdlib")
    samples = []
    for submodel, kind, name in EXTRACTED:
        directory = run / "submodels" / name
        shutil.rmtree(directory, ignore_errors=True)
        matformer("extract", run, "--submodel", submodel, "--format", kind, "--output", directory)
        for prompt in PROMPTS:
            generated = sample(directory, prompt, max_new_tokens=80, temperature=0.7, seed=1)
            samples.append(
                {
                    "submodel": submodel,
                    "prompt": prompt,
                    "text": generated.text,
                    "seconds": generated.seconds,
                    "tokens_per_second": generated.tokens / generated.seconds,
                }
            )
        print(f"\n--- {submodel} goes on from {prompt!r} ---\n{prompt}{generated.text}\n---\n")
    (run / "samples.json").write_text(json.dumps(samples, indent=1))
    matformer("report", run)
    print(f"\ndone in {time.monotonic() - begun:.0f} s; open {run / 'report.html'}")


def prepare_corpus(prefix: Path) -> None:
    """The library's source as token files, where they are not there yet."""
    if Path(f"{prefix}.idx").exists():
        return
    stdlib = sysconfig.get_paths()["stdlib"]
    # HELD_OUT: what the tasks `stdlib` ask for
    leave_out = [word for name in (*NOT_LIBRARY, *HELD_OUT) for word in ("--exclude", name)]
    matformer(
        "prepare-data", stdlib, "--include", "*.py", *leave_out, "--output", prefix,
        "--vocab-size", 2048,
    )  # fmt: skip


def matformer(*words: object) -> None:
    show([SCRIPTS / "matformer", *words])


def show(words: list[object], environment: dict[str, str] | None = None) -> None:
    """Print a command and run it; its failure ends the demo with its exit code."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(code)


def run_demo(demo: Callable[[], None]) -> None:
    """A user's mistake is one message and exit code 2."""
    try:
        demo()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_demo(main)
