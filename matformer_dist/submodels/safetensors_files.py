"""Weights as safetensors files, in shards under the names that transformers expects.

The format: the length of the header in 8 bytes, the header (JSON: dtype, shape and place of every
tensor), the tensors one behind the other. The library's own writer wants all tensors of a file at
once; since their sizes are known beforehand, here they are written as they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matformer_dist.checkpoints.files import start_write_back
from matformer_dist.checkpoints.memory import ReusedMemory
from matformer_dist.errors import UserError
from matformer_dist.submodels.parts import Part, Parts

SHARD_BYTES = 5 * 10**9  # as transformers
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsFiles:
    """One file where all parts fit into `shard_bytes`, else shards and an index."""

    def __init__(self, parts: Parts, dtype: torch.dtype, shard_bytes: int) -> None:
        self.parts = parts
        self.dtype = dtype
        ordered = [part for of_weight in parts.values() for part in of_weight]
        self.bytes = sum(map(self._size, ordered))
        shards: list[list[Part]] = []
        filled_bytes = 0
        for part in ordered:
            if not shards or filled_bytes + self._size(part) > shard_bytes:
                shards.append([])
                filled_bytes = 0
            shards[-1].append(part)
            filled_bytes += self._size(part)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._shards = dict(zip(names if len(shards) > 1 else [_SINGLE], shards, strict=True))
        self._file: BinaryIO | None = None

    def open(self, directory: Path) -> None:
        self._directory = directory
        self._waiting = iter(self._shards.items())
        self._left: list[Part] = []  # of the file that is being written
        if len(self._shards) > 1:
            weight_map = {part.name: file for file, shard in self._shards.items() for part in shard}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            (directory / _INDEX).write_text(json.dumps(index, indent=2))

    def write(self, part: Part, weight: Tensor, memory: ReusedMemory) -> None:
        if not self._left:
            self.close()
            name, shard = next(self._waiting)
            self._left = list(shard)
            self._file = (self._directory / name).open("wb")
            self._file.write(self._header(shard))
        expected = self._left.pop(0)
        assert self._file is not None and part is expected, "parts come in their order"
        values = part.values(weight, self.dtype, memory)
        first = self._file.tell()
        self._file.write(values.view(torch.uint8).numpy().data)
        start_write_back(self._file, first)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _size(self, part: Part) -> int:
        return torch.Size(part.shape).numel() * self.dtype.itemsize

    def _header(self, shard: Sequence[Part]) -> bytes:
        """Length and content, filled up with spaces so that the tensors begin at 8 bytes."""
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in shard:
            begin, end = end, end + self._size(part)
            content[part.name] = {
                "dtype": _DTYPES[self.dtype],
                "shape": list(part.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) pairs of a directory of SafetensorsFiles; UserError if damaged."""
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
