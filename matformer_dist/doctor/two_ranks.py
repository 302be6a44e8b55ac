"""Two processes on this machine that really reduce something together."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matformer_dist.doctor.finding import Finding, failure
from matformer_dist.parallel.topology import cpu_environment

_RANKS = 2
_LIMIT_S = 60.0
_REMEDIES = {
    "gloo": "set GLOO_SOCKET_IFNAME to an interface that works (above), and look for a firewall "
    "between the processes of this machine",
    "nccl": "run again with NCCL_DEBUG=INFO, which names what fails; NCCL_P2P_DISABLE=1 and "
    "NCCL_SHM_DISABLE=1 tell whether it is the way between the GPUs",
}


def tests() -> Iterator[Finding]:
    yield try_ranks("gloo", cpu_environment(_RANKS))
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus >= _RANKS:
        yield try_ranks("nccl", None)
    else:
        yield Finding(_what("nccl"), f"not tried: it takes {_RANKS} GPUs, and {gpus} are here")


def try_ranks(
    backend: str, environment: Mapping[str, str] | None, limit_s: float = _LIMIT_S
) -> Finding:
    """A test of so many seconds at most; None for this process' environment."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "matformer_dist.doctor.rank", f"{folder}/store"]
        files = [Path(folder) / f"rank{rank}" for rank in range(_RANKS)]
        outputs = [path.open("w+") for path in files]
        processes = [
            subprocess.Popen(
                [*words, str(rank), str(_RANKS), backend, str(limit_s)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            in_time = _wait(processes, begun + limit_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for output in outputs:
                output.close()
        printed = [path.read_text(errors="replace") for path in files]
    if not in_time:
        return _failed(backend, f"no answer in {limit_s:g} s", printed)
    if any(process.returncode for process in processes):
        codes = ", ".join(str(process.returncode) for process in processes)
        return _failed(backend, f"failed with exit codes {codes}", printed)
    return _judged(backend, printed, time.monotonic() - begun)


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Until all have ended or one has failed; whether that was in time."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return True
        time.sleep(0.05)
    return False


def _judged(backend: str, printed: Sequence[str], seconds: float) -> Finding:
    try:
        measured = [json.loads(text.strip().splitlines()[-1]) for text in printed]
        is_right = all(one["right"] for one in measured)
        rate = min(one["bytes_per_second"] for one in measured)
        latency_ms = max(one["latency_ms"] for one in measured)
    except (ValueError, IndexError, KeyError, TypeError):
        return _failed(backend, "did not say what it measured", printed)
    if not is_right:
        return _failed(backend, "the sum over ranks was wrong", printed)
    return Finding(
        _what(backend),
        f"all-reduce right, {rate / 1e9:.3g} GB/s, {latency_ms:.3g} ms the smallest; "
        f"{seconds:.1f} s in all",
    )


def _failed(backend: str, how: str, printed: Sequence[str]) -> Finding:
    last = [lines[-1].strip() for text in printed if (lines := text.strip().splitlines())]
    said = f" ({'; '.join(dict.fromkeys(last))[:300]})" if last else ""
    return failure(
        _what(backend),
        f"{how}{said}",
        f"{_RANKS} ranks on this machine cannot communicate over {backend}: {how}{said}; "
        f"{_REMEDIES[backend]}",
    )


def _what(backend: str) -> str:
    return f"{_RANKS} {backend} ranks"
