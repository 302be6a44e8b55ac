"""Parquet files with a column of images and one of labels, such as those of Hugging Face.

Parquet is read by row groups, so an image costs its whole group unless that is among those a
process keeps: the last ones read, up to 256 MiB. Groups of 100 rows, as `datasets` writes them,
cost about as much as decoding an image where the files are in memory, and a hundred times the bytes
of the images where they are not. With data.shuffle: row_groups a process reads no group twice in
an epoch, as long as eight of them fit into those 256 MiB.
The `datasets` library is not used: for random access it copies all data into files of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from matformer_dist.data.images.order import Indices
from matformer_dist.data.images.parquet_index import FileIndex, index_file, one_line
from matformer_dist.data.images.source import EncodedSource, numbered
from matformer_dist.errors import LocalError, UserError

_KEPT_BYTES = 1 << 28  # of row groups, a process


class ParquetSource(EncodedSource):
    """File by file, row by row."""

    def __init__(self, path: str, files: Sequence[str], image: str, label: str) -> None:
        self._files, self._column = list(files), image
        found = [index_file(file, image, label) for file in files]
        rows = [count for file in found for count in file.group_rows]
        self._starts = np.cumsum([0, *rows], dtype=np.int64)  # of groups, and the end
        counts = [len(file.group_rows) for file in found]
        self._file_of = np.repeat(np.arange(len(found)), counts)
        self._first_group = np.cumsum([0, *counts])[:-1]  # of each file
        labels, names = self._labels(found)
        super().__init__(path, labels, names)
        self.groups = np.unique(self._starts[:-1][np.diff(self._starts) > 0])
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}  # of a copy: its own

    def file(self, sample: int) -> str:
        return self._files[self._file_of[self._group_of(sample)]]

    def where(self, sample: int) -> str:
        file = self._file_of[self._group_of(sample)]
        row = sample - self._starts[self._first_group[file]]
        return f"row {row} of {self._files[file]}"

    def encoded(self, sample: int) -> bytes:
        group = self._group_of(sample)
        value = self._group(group)[sample - int(self._starts[group])].as_py()
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise LocalError(
                f"{self.where(sample)} has no bytes in column {self._column}; a path alone is not "
                "enough: write the images into the file, or leave such rows out"
            )
        return bytes(value)

    @property
    def kept_bytes(self) -> int:
        """Of the row groups in memory."""
        return sum(int(column.nbytes) for column in self._kept.values())

    def _group_of(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _group(self, group: int) -> Any:
        """The column of images of a row group."""
        if group not in self._kept:
            self._kept[group] = self._read(group)
            while len(self._kept) > 1 and self.kept_bytes > _KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _read(self, group: int) -> Any:
        """Without threads of pyarrow, which processes that were forked do not have."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = int(self._file_of[group])
        number = group - int(self._first_group[file])
        try:
            with pq.ParquetFile(self._files[file], pre_buffer=False) as opened:
                table = opened.read_row_group(number, columns=[self._column], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise LocalError(
                f"cannot read row group {number} of {self._files[file]}: {one_line(error)}; the "
                "file is damaged, or this rank cannot read it"
            ) from None
        return table.column(0)

    def _labels(self, found: Sequence[FileIndex]) -> tuple[Indices, tuple[str, ...] | None]:
        for (first, one), (second, other) in pairwise(zip(self._files, found, strict=True)):
            if one.names != other.names:
                raise UserError(
                    f"{first} and {second} do not name the same classes in the same order; give "
                    "files of one data set"
                )
        if all(isinstance(file.labels, np.ndarray) for file in found):
            return np.concatenate([file.labels for file in found]), found[0].names
        return numbered([value for file in found for value in file.labels], self.where)
