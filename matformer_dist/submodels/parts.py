"""What the files of extracted models hold: parts of the parent's weights, written in one pass.

A format is a function from a `Source` to an `Export`. It says, for every weight of the parent,
which tensors become of it, and into which kind of file they go. `write_weights` reads each weight
once, and hands it to all models that are being written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from matformer_dist.checkpoints.memory import ReusedMemory
from matformer_dist.checkpoints.universal import UniversalModel
from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.data.images.classes import ClassNames
from matformer_dist.data.images.preprocessing import Preprocessing
from matformer_dist.data.labels import Labels
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.nesting import Submodel
from matformer_dist.submodels.mapped_memory import release_files

_BLOCK_ROWS = 128
_KEPT_BYTES = 256 * 1024**2
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Part(NamedTuple):
    """One tensor of a file.

    `cut` makes it of the whole weight, as a view where it can. Where that is smaller than `shape`,
    it is the first corner, and the rest is zeros.
    """

    name: str
    shape: tuple[int, ...]
    cut: Callable[[Tensor], Tensor]

    def values(self, weight: Tensor, dtype: torch.dtype, memory: ReusedMemory) -> Tensor:
        """[*shape] of `dtype`, contiguous, until `memory` is used again.

        UserError where the range of `dtype` does not hold a value; the weight's own are finite.
        """
        found = self.cut(weight)
        if found.shape == self.shape and found.dtype == dtype and found.is_contiguous():
            return found
        stored = memory.take("part", self.shape, dtype)
        if found.shape != self.shape:
            stored.zero_()
        corner = stored[tuple(slice(size) for size in found.shape)]
        if found.dim() == 2 and found.stride(1) != 1:
            _copy_transposed(found, corner)
        else:
            corner.copy_(found)
        if dtype != found.dtype and largest(stored) == torch.inf:
            self.refuse_range(largest(found), _NAMES[dtype])
        return stored

    def refuse_range(self, found: float, dtype: str) -> NoReturn:
        others = "fp32" if dtype == "bf16" else "bf16 or fp32"
        raise UserError(
            f"{self.name} holds values up to {found:.3g}, beyond the range of {dtype}; choose "
            f"{others}"
        )


# By the names of the parent's weights.
Parts = Mapping[str, Sequence[Part]]


class WeightFiles(Protocol):
    """The weight files of one model. `write` is called for every part, in the order of `parts`."""

    parts: Parts  # in the order of UniversalModel.whole
    bytes: int  # of all tensors, known before anything is written

    def open(self, directory: Path) -> None: ...

    def write(self, part: Part, weight: Tensor, memory: ReusedMemory) -> None:
        """`weight` is the parent's, of which an FFN's may end behind the widest model."""

    def close(self) -> None:
        """Called after an error too."""


@dataclass(frozen=True)
class Source:
    """What an extracted model is made of."""

    universal: UniversalModel
    submodel: Submodel
    labels: Labels
    dtype: str  # of the format's DTYPES
    shard_bytes: int
    image_preprocessing: Preprocessing | None = None  # of the run, where it reads images

    @property
    def language_model(self) -> LanguageModelConfig:
        model = self.universal.model
        assert isinstance(model, LanguageModelConfig), "extract chooses formats by the model"
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        assert isinstance(self.labels, Tokenizer)
        return self.labels

    @property
    def vision_model(self) -> VisionModelConfig:
        model = self.universal.model
        assert isinstance(model, VisionModelConfig), "extract chooses formats by the model"
        return model

    @property
    def class_names(self) -> ClassNames:
        assert isinstance(self.labels, ClassNames)
        return self.labels

    @property
    def preprocessing(self) -> Preprocessing:
        assert self.image_preprocessing is not None
        return self.image_preprocessing

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True)
class Export:
    """One model in one format, before anything is written."""

    weights: WeightFiles
    files: Mapping[str, str | bytes]  # the others by name: config, tokenizer, code
    padded_width: int | None = None  # where narrower layers are filled with zeros
    sparse: bool = False  # of format hf: loaded by the code beside it
    nested: bool = False  # of format hf: the same, and every submodel runs


def write_weights(
    universal: UniversalModel,
    models: Sequence[tuple[WeightFiles, Path]],
    widths: Sequence[int],
) -> None:
    """Write the weights of all `models`, each into its directory, in one pass over the parent.

    widths: of each layer's FFN, how much of the parent's is read. Memory: one weight of the parent,
    its shards and the pages of files that hold them; or, behind that, the weight and one part.
    """
    memory = ReusedMemory()
    try:
        for files, directory in models:
            files.open(directory)
        for name in universal.whole:
            layer = layer_of(name)
            rows = None if layer is None else rows_within(universal, name, widths[layer])
            memory.release("part", _KEPT_BYTES)
            weight = universal.weight(name, rows=rows, memory=memory)
            release_files(universal.checkpoint.path)
            if not isfinite(largest(weight)):
                raise UserError(
                    f"{name} of {universal.checkpoint.path} holds values that are not finite; "
                    "choose another step"
                )
            for files, _ in models:
                for part in files.parts[name]:
                    files.write(part, weight, memory)
    finally:
        for files, _ in models:
            files.close()


def rows_within(universal: UniversalModel, name: str, width: int) -> int | None:
    """How many rows of a weight belong to the first `width` neurons; None: it has no neurons."""
    if universal.partition(name).blocks is None:
        return None
    return universal.whole[name].shape[0] // universal.nesting.d_ff * width


def layer_of(name: str) -> int | None:
    """The layer that a weight of a MatFormer belongs to."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def transposed_neurons(width: int, w_out: Tensor) -> Tensor:
    """w_out [F, D] -> [D, m], of the first m neurons: a Part's cut."""
    return w_out[:width].T


def _copy_transposed(source: Tensor, target: Tensor) -> None:
    """Copy columns that lie in memory one after the other, by blocks.

    torch has fast kernels to convert, and to transpose, but not for both at once.
    """
    for first in range(0, len(source), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        target[rows].copy_(source[rows].to(target.dtype, copy=True).contiguous())


@torch.no_grad()  # DeepSpeed saves parameters
def largest(values: Tensor) -> float:
    """Largest magnitude; nan where there is one."""
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))
