"""How long training stands still for a checkpoint, written at once or beside the training.

    python -m benchmarks.checkpoint

In turns, in one process that trains a MatLM under DeepSpeed (ZeRO 1, fp32): (a) DeepSpeed's own
save, neither put on disk nor hashed; (b) ours; (c) ours with checkpoint.async_save, the training
going on until the files are written; and (d) cp of the checkpoint, and sync. Printed: medians of
the seconds that the loop stands still; of (c) also when the checkpoint is there, and how much
longer a step takes until then.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from matformer_dist.checkpoints.store import CheckpointStore
from matformer_dist.config import Config
from matformer_dist.config_file import validate_config
from matformer_dist.models.forward_pass import Pass
from matformer_dist.parallel.topology import initialize, quiet_libraries
from matformer_dist.run_directory import Manifest, find_checkpoint

VOCAB = 8192
SEQ_LEN = 64


def config_of(run: Path, d_model: int, layers: int) -> Config:
    model = {
        "d_model": d_model, "n_layers": layers, "n_heads": d_model // 64, "d_ff": 4 * d_model,
        "max_seq_len": SEQ_LEN,
    }  # fmt: skip
    tree = {
        "run": {"dir": str(run)},
        "model": model,
        "nesting": {"fractions": ["1/8", "1/4", "1/2", "1"]},
        "objective": {"kind": "per_sequence"},
        "parallel": {"tensor": 1},
        "data": {"train": [[1, "unused"]], "tokenizer": "unused"},
        "optimizer": {"lr": 1e-4},
        "training": {
            "steps": 1, "seq_len": SEQ_LEN, "micro_batch_size": 4, "global_batch_size": 4,
            "precision": "fp32",
        },
        "checkpoint": {"keep_last": 1},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    return validate_config(tree, "this benchmark")


class Training:
    """Steps on made-up tokens, and the two ways to save."""

    def __init__(self, run: Path, d_model: int, layers: int) -> None:
        from matformer_dist.training import setup
        from matformer_dist.training.engine import Engine, build_model

        self.topology = initialize(1)
        self.config = config_of(run, d_model, layers)
        self.engine = Engine(
            self.config, build_model(self.config, VOCAB, self.topology), self.topology
        )
        self.store = CheckpointStore(run, self.config.checkpoint)
        self.manifest = setup.describe(self.config, self.topology, "", VOCAB, 0)
        self._saved = 0

    def step(self) -> float:
        """Seconds of an optimizer step."""
        ids = torch.randint(VOCAB, (4, SEQ_LEN + 1))
        largest = self.config.granularities.uniforms(self.config.model.n_layers)[0]
        begun = time.perf_counter()
        batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        self.engine.train_step(iter([batch]), iter([Pass.evaluation([largest], 4)]), 1e-4)
        return time.perf_counter() - begun

    def next_manifest(self) -> Manifest:
        self._saved += 1
        return self.manifest.model_copy(update={"step": self._saved})

    def save(self, in_background: bool) -> dict[str, float]:
        self.engine.writer.in_background = in_background
        begun = time.perf_counter()
        self.store.save(self.engine, self.next_manifest())
        steps = []
        while in_background and not self.store.is_written:
            steps.append(self.step())
        self.store.finish()
        return {
            "there_after": time.perf_counter() - begun,
            "stands_still": self.store.take_seconds(),
            "step": statistics.median(steps) if steps else 0.0,
        }

    def save_as_deepspeed(self, folder: Path) -> float:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        ours = self.engine.deepspeed.checkpoint_engine
        self.engine.deepspeed.checkpoint_engine = TorchCheckpointEngine()
        begun = time.perf_counter()
        self.engine.deepspeed.save_checkpoint(str(folder), "theirs", save_latest=False)
        seconds = time.perf_counter() - begun
        self.engine.deepspeed.checkpoint_engine = ours
        return seconds


def turns(training: Training, folder: Path, count: int) -> Iterator[dict[str, float]]:
    run = training.store.run_dir
    for _ in range(count):
        row = {"step": statistics.median(training.step() for _ in range(5))}
        row["deepspeed"] = training.save_as_deepspeed(folder / "theirs")
        subprocess.run(["sync"], check=True)
        row["at_once"] = training.save(in_background=False)["stands_still"]
        subprocess.run(["sync"], check=True)
        beside = training.save(in_background=True)
        row["beside"], row["beside_there_after"] = beside["stands_still"], beside["there_after"]
        row["beside_step"] = beside["step"]
        subprocess.run(["sync"], check=True)
        row["cp_and_sync"] = copy_seconds(find_checkpoint(run).path, folder / "copied")
        yield row


def copy_seconds(source: Path, target: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint.json")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        training = Training(folder / "run", arguments.d_model, arguments.layers)
        training.step()
        rounds = list(turns(training, folder, arguments.turns))
        files = find_checkpoint(training.store.run_dir).manifest.files.values()
    row: dict[str, Any] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    row["bytes"] = sum(file.bytes for file in files)
    print(f"checkpoint of {row['bytes'] / 1e9:.2f} GB; seconds that training stands still:")
    for key, what in {
        "deepspeed": "DeepSpeed's own save, not on disk, not hashed",
        "at_once": "ours",
        "beside": "ours, checkpoint.async_save",
        "cp_and_sync": "cp and sync, for comparison",
    }.items():
        print(f"{row[key]:8.2f}  {what}")
    print(
        f"beside the training it is there after {row['beside_there_after']:.2f} s; a step takes "
        f"{row['beside_step']:.2f} s meanwhile, {row['step']:.2f} s else"
    )
    settings = {"d_model": arguments.d_model, "layers": arguments.layers, "turns": arguments.turns}
    write_result(arguments.output, "cpu", ("torch", "deepspeed"), settings, **row)


if __name__ == "__main__":
    main()
