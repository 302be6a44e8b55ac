"""Weights as safetensors files, in shards under the names that transformers expects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from matformer_dist.errors import UserError

SHARD_BYTES = 5 * 10**9  # as transformers
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def write_weights(
    directory: Path,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write (name, weight) pairs as they come, holding one shard in memory; returns bytes.

    One file where all fit into `shard_bytes`, else shards and an index. UserError where a weight
    does not fit the range of `dtype`.
    """
    shards: list[list[str]] = []  # names by shard
    shard: dict[str, Tensor] = {}
    total_bytes = filled_bytes = 0

    def flush() -> None:
        save_file(shard, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, weight in weights:
        stored = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not stored.isfinite().all() and weight.isfinite().all():
            raise UserError(
                f"{name} holds values up to {weight.abs().max():.3g}, beyond the range of "
                f"{str(dtype).removeprefix('torch.')}; choose bf16 or fp32"
            )
        if shard and filled_bytes + stored.nbytes > shard_bytes:
            flush()
            filled_bytes = 0
        shard[name] = stored
        filled_bytes += stored.nbytes
        total_bytes += stored.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / _SINGLE)
        return total_bytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2))
    return total_bytes


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) pairs of a directory that `write_weights` wrote; UserError if damaged."""
    try:
        files = [_SINGLE]
        if (directory / _INDEX).exists():
            index = json.loads((directory / _INDEX).read_text())
            files = sorted(set(index["weight_map"].values()))
        for file in files:
            with safe_open(directory / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    yield name, opened.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights in {directory} ({error}); extract the model again"
        ) from None
