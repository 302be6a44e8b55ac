"""WebDataset's shards: tar files whose neighbouring members of one name are a sample.

    n01440764/3.jpg  n01440764/3.cls        the name ends at its first dot
    17.png           17.json                {"label": 4, ...}

One pass over the headers of all shards, on the main rank, finds where images begin; then any is
read by itself. That takes about two minutes for a million images in memory. The `webdataset`
library is not used: it reads shards from front to back, in an order that depends on how many do.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from matformer_dist.data.images.source import EncodedSource, numbered
from matformer_dist.errors import LocalError, UserError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LARGEST_LABEL_BYTES = 1 << 24


class _Found(NamedTuple):
    offset: int  # bytes from the beginning of the shard
    size: int  # bytes
    label: int | str


class TarSource(EncodedSource):
    """Shard by shard, in the order of their members."""

    def __init__(self, path: str, files: Sequence[str], label: str) -> None:
        self._files = list(files)
        found: list[_Found] = []
        counts = []
        for file in files:
            counts.append(-len(found))
            found += _samples(file, label)
            counts[-1] += len(found)
        self._file_of = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        self._offsets = np.array([one.offset for one in found], np.int64)
        self._sizes = np.array([one.size for one in found], np.int64)
        labels, names = numbered([one.label for one in found], self.where)
        super().__init__(path, labels, names)

    def file(self, sample: int) -> str:
        return self._files[self._file_of[sample]]

    def where(self, sample: int) -> str:
        """Looks its name up again, for messages only."""
        file, offset = self.file(sample), self._offsets[sample]
        try:
            with tarfile.open(file, "r:") as tar:
                name = next((m.name for m in tar if m.offset_data == offset), None)
        except (OSError, tarfile.TarError):
            name = None
        return f"{name or f'the image at byte {offset}'} in {file}"

    def encoded(self, sample: int) -> bytes:
        size = int(self._sizes[sample])
        with open(self.file(sample), "rb") as file:
            file.seek(int(self._offsets[sample]))
            data = file.read(size)
        if len(data) != size:
            raise LocalError(
                f"{self.file(sample)} has become shorter since the run began; "
                "data must stay as they are while they are read"
            )
        return data


def _samples(file: str, key: str) -> Iterator[_Found]:
    """Of one shard; UserError for one that is damaged, and for samples that lack a part."""
    try:
        with tarfile.open(file, "r:") as tar:
            members = (member for member in tar if member.isreg() and _split(member.name)[1])
            for name, parts in groupby(members, lambda member: _split(member.name)[0]):
                yield _sample(tar, f"{name} in {file}", list(parts), key)
                tar.members.clear()  # type: ignore[attr-defined]  # or it would keep them all
            end = tar.offset
        _check_end(file, end)
    except tarfile.TarError as error:
        raise UserError(
            f"{file} is damaged, or no tar file: {error}; shards must not be compressed"
        ) from None


def _check_end(file: str, offset: int) -> None:
    """tarfile takes a shard that is cut at a header for a whole one; only the mark tells."""
    with open(file, "rb") as shard:
        shard.seek(offset)
        mark = shard.read(tarfile.BLOCKSIZE)
    if mark != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{file} is cut off, or damaged, at byte {offset}: there is neither a header nor the "
            "mark of a tar file's end; copy or make it again"
        )


def _split(name: str) -> tuple[str, str]:
    """Of a member: the sample it belongs to, and which part of it it is."""
    folder, slash, file = name.rpartition("/")
    base, _, extension = file.partition(".")
    return f"{folder}{slash}{base}", extension.lower() if base else ""


def _sample(
    tar: tarfile.TarFile, where: str, members: Sequence[tarfile.TarInfo], key: str
) -> _Found:
    parts: dict[str, tarfile.TarInfo] = {}
    for member in members:
        extension = _split(member.name)[1]
        if extension in parts:
            raise UserError(f"the sample {where} has two parts .{extension}; names must differ")
        parts[extension] = member
    images = [extension for extension in _IMAGES if extension in parts]
    if len(images) != 1:
        raise UserError(
            f"the sample {where} has {len(images)} images among its parts "
            f"({', '.join(parts)}); it must have one, of {', '.join(_IMAGES)}"
        )
    image = parts[images[0]]
    return _Found(image.offset_data, image.size, _label(tar, where, parts, key))


def _label(
    tar: tarfile.TarFile, where: str, parts: dict[str, tarfile.TarInfo], key: str
) -> int | str:
    """The number in .cls, else the number or name under `key` in .json."""
    member = parts.get("cls") or parts.get("json")
    if member is None:
        raise UserError(
            f"the sample {where} has no label; it needs a part .cls with a number, or a part .json"
        )
    if member.size > _LARGEST_LABEL_BYTES:
        raise UserError(f"{member.name} of the sample {where} is too large for a label")
    stream = tar.extractfile(member)
    assert stream is not None  # of a regular file
    data = stream.read()
    try:
        value = int(data) if "cls" in parts else json.loads(data)[key]
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        wanted = "a number" if "cls" in parts else f"a JSON object with {key!r}, a number or a name"
        raise UserError(
            f"the label of the sample {where} is {data[:40]!r}; it must be {wanted}"
            + ("" if "cls" in parts else " (data.label_column)")
        )
    return value
