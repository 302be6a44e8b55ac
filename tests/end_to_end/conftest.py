"""A small corpus, prepared once by the command, and a configuration that trains on it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
Command = Callable[..., subprocess.CompletedProcess[str]]


def run(*words: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command from the checkout, as a user would; its output is captured."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def matformer(*words: object) -> subprocess.CompletedProcess[str]:
    return run(SCRIPTS / "matformer", *words)


def train(
    config: Path, *overrides: str, ranks: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `launch(...)` to its end."""
    return run(*launch(config, *overrides, ranks=ranks))


def launch(config: Path, *overrides: str, ranks: int | None = None) -> list[str]:
    """launch/train.py under plain python, or under the deepspeed launcher with `ranks`."""
    words: list[object] = ["launch/train.py", "--config", config, *overrides]
    if ranks is None:
        words = [sys.executable, *words]
    else:
        launcher = [SCRIPTS / "deepspeed", "--quiet", "--num_gpus", ranks]
        words = [*launcher, "--master_port", free_port(), *words]
    return [str(word) for word in words]


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a command that must succeed."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def refuse(done: subprocess.CompletedProcess[str], says: str) -> None:
    """A user's mistake: exit code 2, one message that says what is wrong, no traceback."""
    everything = done.stdout + done.stderr
    assert done.returncode == 2, everything[-3000:]
    assert "Traceback" not in everything
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]


def write_config(path: Path, corpus: Path, run_dir: Path, **sections: dict[str, object]) -> Path:
    tree: dict[str, dict[str, object]] = {
        "run": {"dir": str(run_dir)},
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "max_seq_len": 64},
        "objective": {"kind": "per_sequence"},
        "parallel": {"tensor": 1},
        "data": {
            "train": [[1.0, str(corpus)]],
            "split": [80, 20],
            "tokenizer": f"{corpus}.model",
        },
        "optimizer": {"lr": 3e-3},
        "training": {
            "steps": 6,
            "seq_len": 32,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "precision": "fp32",
        },
        "evaluation": {"every": 3, "batches": 2, "submodels": ["S:1,L:1"]},
        "checkpoint": {"every": 2},
        "logging": {"every": 1},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a prepared corpus: source files of the standard library, 600 pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    library = Path(inspect.getfile(inspect)).parent
    for name in ("argparse", "ast", "bisect", "calendar", "csv", "dis", "enum", "heapq", "json"):
        file = library / f"{name}.py"
        if file.exists():
            (texts / file.name).write_bytes(file.read_bytes())
    prefix = folder / "data" / "stdlib"
    succeed(matformer("prepare-data", texts, "--output", prefix, "--vocab-size", 600))
    return prefix
