"""What a Parquet file of images holds, from its footer and its column of labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matformer_dist.data.images.order import Indices
from matformer_dist.errors import UserError

_LARGEST_GROUP_BYTES = 1 << 30
_METADATA = b"huggingface"


@dataclass(frozen=True)
class FileIndex:
    """labels: int64 [rows], or names; names: of the feature ClassLabel, where there is one."""

    group_rows: list[int]
    labels: Indices | list[str]
    names: tuple[str, ...] | None


def index_file(path: str, image: str, label: str) -> FileIndex:
    """UserError for a file that is damaged, lacks a column, or has one of another kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            for column, key in ((image, "image_column"), (label, "label_column")):
                if column not in schema.names:
                    raise UserError(
                        f"{path} has no column {column!r}, but {', '.join(schema.names)}; set "
                        f"data.{key} to one of them"
                    )
            _check_images(path, image, schema.field(image).type)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            _check_groups(path, image, groups)
            labels = _labels(path, label, file.read([label], use_threads=False).column(0))
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged, or no Parquet file: {one_line(error)}") from None
    names = _class_label(path, label, schema.metadata or {})
    if names is not None and isinstance(labels, list):
        raise UserError(f"{path} numbers classes in its metadata, but column {label} holds texts")
    return FileIndex([group.num_rows for group in groups], labels, names)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_images(path: str, column: str, kind: Any) -> None:
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        raise UserError(
            f"column {column} of {path} holds {kind}; images are the bytes of image files, or a "
            "struct {bytes, path} with them: set data.image_column to their column"
        )


def _check_groups(path: str, column: str, groups: Sequence[Any]) -> None:
    """One row group must fit in memory, of every process that reads."""
    for group in groups:
        chunks = [group.column(i) for i in range(group.num_columns)]
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] == column
        )
        if size > _LARGEST_GROUP_BYTES:
            raise UserError(
                f"{path} has a row group with {size / 1e9:.1f} GB of images, which would be read "
                f"for every image; write it again with groups of about 100 rows (row_group_size)"
            )


def _labels(path: str, column: str, values: Any) -> Indices | list[str]:
    import pyarrow as pa

    kind = values.type
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise UserError(f"row {row} of {path} has no label in column {column}; give it one")
    if pa.types.is_integer(kind):
        return values.to_numpy().astype(np.int64)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts: list[str] = values.to_pylist()
        return texts
    raise UserError(
        f"column {column} of {path} holds {values.type}; labels are whole numbers or names: set "
        "data.label_column to their column"
    )


def _class_label(path: str, column: str, metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """Names of the feature ClassLabel, which the library `datasets` keeps in the schema."""
    if _METADATA not in metadata:
        return None
    try:
        feature = json.loads(metadata[_METADATA])["info"]["features"][column]
        if feature["_type"] != "ClassLabel":
            return None
        return tuple(str(name) for name in feature["names"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} has metadata of the library datasets that do not describe column {column}; "
            "write the file again"
        ) from None
