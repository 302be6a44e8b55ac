"""Speed and memory of `matformer prepare-data` against bare SentencePiece encoding.

    python -m benchmarks.prepare_data

The corpus is the Python standard library's own source, repeated. Bare is one process that calls
SentencePiece's `encode` on the same documents, strings in memory, and does nothing else; at its
fastest: long documents in the parts that preparation cuts them into, ids as numpy arrays. In turns:
bare, then a whole preparation (start of the processes, reading, encoding, writing) by as many
processes as there are cores. Printed: text per second, and the share of bare times the processes
that is reached; the same in CPU time, which a busy machine does not spoil; then the peak memory of
all processes together at two sizes of the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, write_result
from matformer_dist.data.corpus import find_files
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer

FORMATS = ("text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")
BARE_BYTES = 8_000_000


def documents(size: int) -> Iterator[str]:
    """Sources of the standard library, over and over, until they have `size` bytes."""
    exclude = ("site-packages", "dist-packages", "test", "tests")
    files = list(find_files([sysconfig.get_paths()["stdlib"]], ("*.py",), exclude))
    for file in cycle(files):
        text = Path(file.path).read_bytes().decode(errors="replace")
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def write_corpus(folder: Path, kind: str, size: int) -> Path:
    """About `size` bytes of text as one file of a format; as files in a folder for "text"."""
    import pyarrow  # here, or every worker process would import it too
    from pyarrow import parquet

    path = folder / f"{size // 1_000_000}.{kind}"
    if kind == "text":
        path.mkdir()
        for i, text in enumerate(documents(size)):
            (path / f"{i:06}.py").write_bytes(text.encode())
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"text": list(documents(size))}), path)
    else:
        codec = {"jsonl.gz": "gzip", "jsonl.zst": "zstd"}.get(kind)
        with pyarrow.output_stream(str(path), compression=codec) as stream:
            for text in documents(size):
                stream.write(json.dumps({"text": text}).encode() + b"\n")
    return path


def bare(tokenizer: SentencePieceTokenizer, texts: list[str]) -> tuple[float, float]:
    """Seconds and CPU seconds a byte of SentencePiece alone, at its fastest."""
    encode = tokenizer._processor.encode
    size = sum(len(text.encode()) for text in texts)
    parts = [part for text in texts for part in tokenizer._parts(text)]
    begun, cpu = time.perf_counter(), time.process_time()
    for part in parts:
        encode(part, out_type="numpy")
    return (time.perf_counter() - begun) / size, (time.process_time() - cpu) / size


def prepare(corpus: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """One preparation in a process of its own: seconds, CPU seconds, and memory."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.prepare_data",
        "--prepare",
        str(corpus),
        str(tokenizer),
        str(workers),
    ]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def print_preparation(corpus: str, tokenizer: str, workers: str) -> None:
    from matformer_dist.data.prepare import prepare_data

    peaks: dict[int, int] = {}
    threading.Thread(target=_watch_memory, args=(peaks,), daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        done = prepare_data([corpus], f"{folder}/d", tokenizer=tokenizer, workers=int(workers))
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    measured = {
        "seconds": done.seconds,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "text_bytes": done.text_bytes,
        "tokens": done.tokens,
        "documents": done.documents,
        "peak_bytes": sum(peaks.values()),
    }
    print(json.dumps(measured))


def _watch_memory(peaks: dict[int, int]) -> None:
    """Keep the peak resident bytes of this process and its children."""
    mine = os.getpid()
    while True:
        children = Path(f"/proc/{mine}/task/{mine}/children").read_text().split()
        for process in (mine, *map(int, children)):
            try:
                status = Path(f"/proc/{process}/status").read_text()
            except OSError:
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    peaks[process] = 1024 * int(line.split()[1])
        time.sleep(0.1)


def measure_speed(
    kind: str, corpus: Path, model: Path, texts: list[str], workers: int, repeats: int
) -> dict[str, Any]:
    """Medians over turns of bare and preparation, each compared with its neighbour."""
    tokenizer = SentencePieceTokenizer.load(model)
    rows = []
    for _ in range(repeats):
        seconds, cpu = bare(tokenizer, texts)
        done = prepare(corpus, model, workers)
        rows.append(
            {
                "bare_mb_per_second": 1e-6 / seconds,
                "mb_per_second": 1e-6 * done["text_bytes"] / done["seconds"],
                "share": seconds * done["text_bytes"] / done["seconds"] / workers,
                "cpu_share": cpu * done["text_bytes"] / done["cpu_seconds"],
            }
        )
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    counts = {key: done[key] for key in ("text_bytes", "tokens", "documents")}
    return {"format": kind, "workers": workers, **medians, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--megabytes", type=int, nargs=2, default=(50, 400))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        print_preparation(*arguments.prepare)
        return
    workers, sizes = arguments.workers, [10**6 * size for size in arguments.megabytes]
    speeds, memory = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tokenizer.model"
        texts = list(documents(BARE_BYTES))
        model.write_bytes(train_tokenizer(texts, arguments.vocab_size).model)
        print("| format | processes | bare MB/s | prepare-data MB/s | of bare x processes | "
              "in CPU time |")  # fmt: skip
        print("|" + "---|" * 6)
        for kind in FORMATS:
            corpus = write_corpus(folder, kind, sizes[0])
            row = measure_speed(kind, corpus, model, texts, workers, arguments.repeats)
            speeds.append(row)
            print(
                f"| {kind} | {workers} | {row['bare_mb_per_second']:.2f} "
                f"| {row['mb_per_second']:.2f} | {row['share']:.0%} | {row['cpu_share']:.0%} |",
                flush=True,
            )
        print("\n| corpus | peak memory of all processes |\n|---|---|")
        for size in sizes:
            corpus = folder / f"{size // 1_000_000}.jsonl"
            if not corpus.exists():
                write_corpus(folder, "jsonl", size)
            row = {"corpus_bytes": size, **prepare(corpus, model, workers)}
            memory.append(row)
            print(f"| {size / 1e6:.0f} MB | {row['peak_bytes'] / 2**20:.0f} MiB |", flush=True)
    settings = {"vocab_size": arguments.vocab_size, "repeats": arguments.repeats}
    path = arguments.output or RESULTS / "prepare_data.json"
    write_result(path, "cpu", ("sentencepiece",), settings, results=speeds, memory=memory)


if __name__ == "__main__":
    main()
