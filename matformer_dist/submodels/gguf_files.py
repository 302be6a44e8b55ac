"""Weights and settings as one GGUF file, written tensor by tensor through the gguf package.

Matrices are of the file's type. Vectors, the norms' weights, are fp32 in all: llama.cpp computes
with them so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matformer_dist.checkpoints.files import start_write_back
from matformer_dist.checkpoints.memory import ReusedMemory
from matformer_dist.errors import UserError
from matformer_dist.submodels.parts import TORCH_DTYPES, Part, Parts

NAME = "model.gguf"
_TENSOR_TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}
_LARGEST_Q8_0 = 127 * 65504  # a block's scale, 1/127 of its largest value, is in fp16
_Q8_0_VALUES = 1 << 19  # quantized at a time
_FILE_TYPES = {
    "fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "fp16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0",
}  # fmt: skip


def gguf_package() -> Any:
    """The gguf package; UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "format gguf needs the gguf package; install it by `pip install "
            "matformer-dist[export]`, or extract with another --format"
        ) from None
    return gguf


def quantize_q8_0(values: Tensor, stored: Tensor) -> float:
    """fp32 values [n, m] to Q8_0's [n, m / 32 * 34]; returns the largest magnitude, rounded up.

    A block of 32 values is an fp16 scale, 1/127 of its largest, and int8 multiples of it: bit for
    bit what gguf.quants.quantize makes, but a piece at a time, which stays in the processor's
    caches.
    """
    largest_scale = torch.zeros(())
    rows = max(1, _Q8_0_VALUES // values.shape[1])
    for piece, out in zip(values.split(rows), stored.split(rows), strict=True):
        blocks = piece.contiguous().view(-1, 32)
        scales = blocks.abs().amax(dim=1, keepdim=True) / 127
        largest_scale = torch.maximum(largest_scale, scales.max())
        scaled = blocks * torch.where(scales == 0, 0, 1 / scales)
        size = scaled.abs()
        whole = size.floor()
        size.sub_(whole).mul_(2).floor_().add_(whole)  # halves away from zero
        encoded = out.view(-1, 34)
        encoded[:, :2] = scales.to(torch.float16).view(torch.uint8)
        encoded[:, 2:].view(torch.int8).copy_(size.copysign_(scaled))
    return 127 * float(largest_scale)


class GgufFile:
    """`describe` gives the writer its settings, once the file is begun. `constants` are fp32
    tensors by name that are no part of a weight.
    """

    def __init__(
        self,
        parts: Parts,
        dtype: str,
        architecture: str,
        describe: Callable[[Any], None],
        constants: Mapping[str, NDArray[Any]],
    ) -> None:
        self._gguf = gguf_package()
        self.parts = parts
        self.dtype = dtype
        self._architecture = architecture
        self._describe = describe
        self._ordered = [part for of_weight in parts.values() for part in of_weight]
        self._constants = constants
        self.bytes = sum(map(self._size, self._ordered))
        self._writer: Any = None

    def open(self, directory: Path) -> None:
        gguf = self._gguf
        self._writer = writer = gguf.GGUFWriter(directory / NAME, self._architecture)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[self.dtype]])
        if self.dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._describe(writer)
        for name, values in self._constants.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for part in self._ordered:
            writer.add_tensor_info(
                part.name, part.shape, np.dtype(np.float32), self._size(part), self._type_of(part)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in self._constants.values():
            writer.write_tensor_data(values)

    def write(self, part: Part, weight: Tensor, memory: ReusedMemory) -> None:
        expected = next(iter(self._writer.tensors[0]))
        assert part.name == expected, "parts come in their order"
        (file,) = self._writer.fout
        first = file.tell()
        values = self._values(part, weight, memory)
        try:
            self._writer.write_tensor_data(values)
        except OSError as error:
            if error.errno is None:  # numpy's own, which says how much was written, but not why
                error = OSError(f"{part.name} could not be written whole: is the disk full?")
            raise error from None
        start_write_back(file, first)

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _type_of(self, part: Part) -> Any:
        name = _TENSOR_TYPES[self.dtype] if len(part.shape) > 1 else "F32"
        return self._gguf.GGMLQuantizationType[name]

    def _size(self, part: Part) -> int:
        """Bytes; UserError where rows are not whole blocks of the type."""
        kind = self._type_of(part)
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if part.shape[-1] % block:
            raise UserError(
                f"{self.dtype} holds rows of blocks of {block} values, {part.name} has rows of "
                f"{part.shape[-1]}; choose fp16 or fp32"
            )
        return torch.Size(part.shape).numel() // block * int(block_bytes)

    def _values(self, part: Part, weight: Tensor, memory: ReusedMemory) -> NDArray[Any]:
        if len(part.shape) == 1:
            return part.values(weight, torch.float32, memory).numpy()
        if self.dtype == "q8_0":
            values = part.cut(weight)
            rows, columns = part.shape
            stored = memory.take("part", (rows, columns // 32 * 34), torch.uint8)
            found = quantize_q8_0(values, stored)
            if found > _LARGEST_Q8_0:
                part.refuse_range(found, self.dtype)
            return stored.numpy()
        stored = part.values(weight, TORCH_DTYPES[self.dtype], memory)
        return (stored.view(torch.uint16) if self.dtype == "bf16" else stored).numpy()
