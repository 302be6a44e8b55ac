"""One rank of the doctor's test: `python -m matformer_dist.doctor.rank STORE RANK RANKS BACKEND`.

It imports torch alone, and prints what it measured as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

BYTES = 32 * 2**20
_REPEATS = 5


def main(store: str, rank: int, ranks: int, backend: str, timeout_s: float) -> None:
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    x = torch.full((BYTES // 4,), float(rank + 1), device=device)
    small = torch.ones(1, device=device)
    dist.all_reduce(x)  # connects
    right = bool((x == sum(range(1, ranks + 1))).all())
    x.zero_()
    measured = {
        "right": right,
        "latency_ms": _seconds(small, device) * 1e3,
        "bytes_per_second": BYTES / _seconds(x, device),
    }
    dist.destroy_process_group()
    print(json.dumps(measured))


def _seconds(x: torch.Tensor, device: torch.device) -> float:
    """The fastest of a few all-reduces."""
    found = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        dist.all_reduce(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return min(found)


if __name__ == "__main__":
    store, rank, ranks, backend, timeout_s = sys.argv[1:]
    main(store, int(rank), int(ranks), backend, float(timeout_s))
