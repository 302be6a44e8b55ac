"""Time and memory of `matformer extract` against copying what it wrote by cp.

    python -m benchmarks.conversion

The parent is a synthetic checkpoint of 1.0 B parameters as DeepSpeed leaves it on two
tensor-parallel ranks with ZeRO 1 over two data-parallel ones, in bf16 with fp32 master weights and
moments, 12.5 GB. In turns, by processes of their own: an extraction that does not verify it, whose
files are on disk when it returns; cp of these files, and then their sync; an extraction that
leaves them in the system's cache, as cp does; and one that verifies, which reads all of the parent.
What is read comes from the cache, as far as that holds it. Printed: medians of seconds; the ratios
of like to like in neighbouring turns, on disk and in the cache; the seconds with verification; the
peak of resident memory, pages of mapped files included, against what it is allowed: three times the
largest weight of the parent, and 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.machine import RESULTS, write_result
from benchmarks.prepare_data import documents
from matformer_dist.checkpoints.deepspeed_files import MOMENTS, optimizer_order
from matformer_dist.checkpoints.files import write_file
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.data.sentencepiece_tokenizer import train_tokenizer
from matformer_dist.models.matlm import MatLM
from matformer_dist.nesting import Nesting
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import TensorParallel
from matformer_dist.run_directory import Layout, Manifest

VOCAB = 16000
RANKS = Layout(tensor=2, data=2, zero_stage=1)
CASES: list[tuple[list[str], dict[str, Any]]] = [
    (["XL"], {"format": "native", "dtype": "fp32"}),
    (["XL"], {"format": "native", "dtype": "bf16"}),
    (["XL"], {"format": "hf", "dtype": "fp32"}),
    (["XL"], {"format": "hf", "dtype": "bf16"}),
    (["S", "M", "L", "XL"], {"format": "native", "dtype": "fp32"}),
    (["S", "M", "L", "XL"], {"format": "hf", "dtype": "bf16"}),
    (["S:8,XL:8"], {"format": "hf", "dtype": "bf16", "sparse": True}),
    (["S"], {"format": "hf", "dtype": "bf16"}),
    (["XL"], {"format": "gguf", "dtype": "fp16"}),
    (["XL"], {"format": "gguf", "dtype": "q8_0"}),
]


def model_config(layers: int) -> LanguageModelConfig:
    shape = {"d_model": 2048, "n_layers": layers, "n_heads": 16, "n_kv_heads": 4, "d_ff": 8192}
    return LanguageModelConfig.model_validate(shape)


def write_parent(directory: Path, model: LanguageModelConfig) -> None:
    tokenizer = train_tokenizer(list(documents(4_000_000)), VOCAB)
    nesting = Nesting.from_fractions(model.d_ff, ["1/8", "1/4", "1/2", "1"])
    checkpoint = directory / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (directory / tokenizer.file_name).write_bytes(tokenizer.model)
    files = {}
    for rank in range(RANKS.tensor):
        for data, state in enumerate(_rank_states(model, nesting, rank)):
            name = f"bf16_zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt"
            files[name] = write_file(checkpoint / name, lambda f, s=state: torch.save(s, f))  # type: ignore[misc, arg-type]
    manifest = Manifest(
        step=1,
        samples=1,
        units=1,
        layout=RANKS,
        model=model,
        nesting=nesting,
        outputs=tokenizer.vocab_size,
        precision="bf16",
        labels_sha256=tokenizer.digest,
        config_sha256="",
        versions={},
        files=files,
    )
    (checkpoint / "manifest.json").write_text(manifest.sealed())


def _rank_states(
    model: LanguageModelConfig, nesting: Nesting, rank: int
) -> Iterator[dict[str, Any]]:
    """What the data-parallel ranks of a tensor-parallel one save: equal parts of flat groups."""
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.device("meta"):
        nestings = [nesting] * model.n_layers
        tensor = TensorParallel(rank, RANKS.tensor)
        local = dict(MatLM(model, nestings, VOCAB, Initializer(None), tensor).named_parameters())
    groups = []
    for names in optimizer_order(local):
        size = sum(local[name].numel() for name in names)
        groups.append(torch.randn(size + size % RANKS.data) * model.init_std)
    for data in range(RANKS.data):
        parts, mappings, states = [], [], {}
        for i, (names, flat) in enumerate(zip(optimizer_order(local), groups, strict=True)):
            size = len(flat) // RANKS.data
            first = data * size
            mapping, at = {}, 0
            for name in names:
                begin, end = max(at, first), min(at + local[name].numel(), first + size)
                if begin < end:
                    mapping[name] = fragment_address(numel=end - begin, start=begin - first)
                at += local[name].numel()
            parts.append(flat[first : first + size].clone())
            mappings.append(mapping)
            moments = {key: torch.zeros(size) for key in MOMENTS}
            states[i] = {**moments, "step": torch.tensor(1.0)}
        optimizer = {
            "single_partition_of_fp32_groups": parts,
            "param_slice_mappings": mappings,
            "base_optimizer_state": {"state": states},
        }
        yield {"optimizer_state_dict": optimizer}


def print_extraction(
    run: str, output: str, submodels: list[str], options: dict[str, Any], way: str
) -> None:
    """In a process of its own: seconds of the extraction, and peak resident bytes."""
    from matformer_dist.submodels.extract import extract

    stack = ExitStack()
    if way == "cached":
        for name in ("extract.sync_file", "gguf_files.start_write_back",
                     "safetensors_files.start_write_back"):  # fmt: skip
            stack.enter_context(mock.patch(f"matformer_dist.submodels.{name}"))
    begun, cpu = time.perf_counter(), time.process_time()
    with stack:
        models = extract(run, submodels, output=Path(output), verify=way == "verified", **options)
    measured = {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "bytes": sum(model.bytes for model in models),
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(measured))


def peak_bytes() -> int:
    """Peak resident memory of this process; getrusage's begins with that of who started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of cp, and of cp and sync."""
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    copied = time.perf_counter() - begun
    subprocess.run(["sync", *(file for file in target.rglob("*") if file.is_file())], check=True)
    return copied, time.perf_counter() - begun


def turn(
    folder: Path, run: Path, submodels: list[str], options: dict[str, Any]
) -> dict[str, float]:
    output, copied = folder / "extracted", folder / "copied"

    def run_extraction(way: str) -> dict[str, float]:
        words = [str(run), str(output), json.dumps(submodels), json.dumps(options), way]
        command = [sys.executable, "-m", "benchmarks.conversion", "--extract", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        return found

    try:
        row = run_extraction("synced")
        row["cp_seconds"], row["cp_and_sync_seconds"] = copy(output, copied)
        shutil.rmtree(output)
        shutil.rmtree(copied)
        row["cached_seconds"] = run_extraction("cached")["seconds"]
        shutil.rmtree(output)
        row["verified_seconds"] = run_extraction("verified")["seconds"]
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(copied, ignore_errors=True)
        os.sync()
    return row


def measure(folder: Path, run: Path, allowed: int, turns: int, only: list[int]) -> Iterator[Any]:
    print(f"{'':<30} {'on disk:':>19} {'in the cache:':>19}\n"
          f"{'submodels':<10} {'format':<9} {'dtype':<5} {'GB':>5}{2 * '      s     cp ratio'}"
          f" {'verified s':>10} {'peak MB':>7} (allowed {allowed / 1e6:.0f})")  # fmt: skip
    for i, (submodels, options) in enumerate(CASES):
        if only and i not in only:
            continue
        rounds = [turn(folder, run, submodels, options) for _ in range(turns)]
        row = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        row["to_cp"] = statistics.median(r["cached_seconds"] / r["cp_seconds"] for r in rounds)
        row["to_cp_and_sync"] = statistics.median(
            r["seconds"] / r["cp_and_sync_seconds"] for r in rounds
        )
        row["peak_bytes"] = max(r["peak_bytes"] for r in rounds)
        kind = options["format"] + (" -s" if options.get("sparse") else "")
        name = submodels[0] if len(submodels) == 1 else f"{len(submodels)} at once"
        print(f"{name:<10} {kind:<9} {options['dtype']:<5} {row['bytes'] / 1e9:5.2f}"
              f" {row['seconds']:6.2f} {row['cp_and_sync_seconds']:6.2f}"
              f" {row['to_cp_and_sync']:5.2f} {row['cached_seconds']:6.2f}"
              f" {row['cp_seconds']:6.2f} {row['to_cp']:5.2f}"
              f" {row['verified_seconds']:10.2f} {row['peak_bytes'] / 1e6:7.0f}",
              flush=True)  # fmt: skip
        yield {"submodels": submodels, **options, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the parent is written, 35 GB at most")
    parser.add_argument("--layers", type=int, default=16, help="16: 1.0 B parameters")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="*", default=[], help="places in CASES")
    parser.add_argument("--output", type=Path, default=RESULTS / "conversion.json")
    parser.add_argument("--extract", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.extract:
        run, output, submodels, options, way = arguments.extract
        print_extraction(run, output, json.loads(submodels), json.loads(options), way)
        return
    model = model_config(arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        run = folder / "run"
        write_parent(run, model)
        allowed = 3 * 4 * max(VOCAB * model.d_model, 2 * model.d_ff * model.d_model) + 10**9
        rows = list(measure(folder, run, allowed, arguments.turns, arguments.only))
    settings = {"layers": model.n_layers, "turns": arguments.turns, "allowed_bytes": allowed}
    write_result(arguments.output, "cpu", ("torch", "safetensors", "gguf"), settings, rows=rows)


if __name__ == "__main__":
    main()
