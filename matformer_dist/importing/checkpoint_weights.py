"""Weights of others, in safetensors: which file holds which, and whether they are what is expected.

Only headers are read before a weight is asked for. Pickles are never read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matformer_dist.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32", "BF16", "F16"}  # fp32 holds all of these exactly

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """For messages."""

    article: str  # and what the model is, as in "a Llama"
    layers: str  # the key of config.json that says how many there are
    to_convert: str  # pickles to safetensors: who does it, and how


class CheckpointWeights:
    """A checkpoint's weights on disk.

    UserError where files are missing, damaged or pickles.
    """

    def __init__(self, directory: Path, kind: Kind) -> None:
        self.directory, self.kind = directory, kind
        self._files = _files_by_weight(directory, kind)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """In fp32; UserError where values are not finite."""
        path = self.directory / self._files[name]
        try:
            with safe_open(path, framework="pt") as opened:
                weight: Tensor = opened.get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {name} in {path} ({error}); download it again") from None
        if not weight.isfinite().all():
            raise UserError(
                f"{name} in {path} holds values that are not finite; the file is damaged, or the "
                "model's training had failed: choose another checkpoint"
            )
        return weight

    def check_layers(self, prefix: str, expected: int) -> None:
        """UserError where fewer layers than expected have weights, called `prefix` and a number."""
        rests = (name[len(prefix) :] for name in self._files if name.startswith(prefix))
        held = len({rest.split(".")[0] for rest in rests if "." in rest})
        if held < expected:
            raise UserError(
                f"{self.directory} does not hold the weights that its config.json describes: "
                f"{self.kind.layers} is {expected}, the files hold {held} layers; "
                "download it again, or choose another checkpoint"
            )

    def check(self, expected: Mapping[str, Shape], unused: Collection[str] = ()) -> None:
        """UserError unless exactly the expected weights are held, of their shapes, and not
        quantised, beside `unused` ones.
        """
        held = self.names.difference(unused)
        missing, strange = sorted(set(expected) - held), sorted(held - set(expected))
        if missing or strange:
            lists = [f"lacks {_some(missing)}"] * bool(missing)
            lists += [f"holds {_some(strange)}, which {self.kind.article} does not have"] * bool(
                strange
            )
            raise UserError(
                f"{self.directory} does not hold the weights that its config.json describes: it "
                f"{' and '.join(lists)}; download it again, or choose another checkpoint"
            )
        for file in sorted({self._files[name] for name in expected}):
            for name, shape, dtype in _header(self.directory / file):
                if name in expected and self._files[name] == file:
                    _check_header(self.directory / file, name, shape, dtype, expected[name])


def by_head(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """Queries [K * G * h, ...], keys and values [K * h, ...] of K key-value heads, G queries each,
    -> [K * (G + 2) * h, ...], a key-value head's queries, key and value side by side.
    """
    parts = [part.unflatten(0, (kv_heads, -1)) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _files_by_weight(directory: Path, kind: Kind) -> dict[str, str]:
    """The file of every weight."""
    if (directory / _SINGLE).exists():
        return {name: _SINGLE for name, _, _ in _header(directory / _SINGLE)}
    if not (directory / _INDEX).exists():
        raise UserError(_without_safetensors(directory, kind))
    try:
        files: dict[str, str] = json.loads((directory / _INDEX).read_text())["weight_map"]
        if not all(Path(file).name == file for file in files.values()):
            raise ValueError("a shard lies in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"cannot read {directory / _INDEX} ({type(error).__name__}: {error}); download it again"
        ) from None
    for file in sorted(set(files.values())):
        inside = {name for name, _, _ in _header(directory / file)}
        missing = sorted(name for name in files if files[name] == file and name not in inside)
        if missing:
            raise UserError(
                f"{directory / file} lacks {_some(missing)}, which {_INDEX} says it holds; "
                "download it again"
            )
    return files


def _without_safetensors(directory: Path, kind: Kind) -> str:
    pickles = [
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
    ]
    if not pickles:
        return (
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; give the folder of a Hugging Face "
            "checkpoint in safetensors"
        )
    return (
        f"{directory} holds its weights in {_some(sorted(pickles))}, pickles, which can run any "
        "code when they are read; only safetensors are imported. Where you trust them, convert "
        f"them with {kind.to_convert}"
    )


def _header(path: Path) -> Iterator[tuple[str, Shape, str]]:
    """(name, shape, dtype) of every tensor of a file."""
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                part = opened.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except (OSError, UnicodeError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); download it again") from None


def _check_header(path: Path, name: str, shape: Shape, dtype: str, expected: Shape) -> None:
    if shape != expected:
        raise UserError(
            f"{name} in {path} is {list(shape)}, config.json makes it {list(expected)}; the two "
            "do not belong together: download them again"
        )
    if dtype not in _DTYPES:
        raise UserError(
            f"{name} in {path} is {dtype}, allowed are {', '.join(sorted(_DTYPES))}; choose a "
            "checkpoint that is not quantised"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
