from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matformer_dist.data.images import parquet
from matformer_dist.data.images.order import Order
from matformer_dist.data.images.parquet import ParquetSource
from matformer_dist.errors import LocalError, UserError
from tests.unit.data.images.pictures import encoded, flat, hugging_face, pairs, write_parquet

LABELS = [3, 0, 1, 2, 2, 0, 3, 1, 1, 0, 2]


def opened(*files: Path, image: str = "image", label: str = "label") -> ParquetSource:
    return ParquetSource("data", [str(file) for file in files], image, label)


def told(source: ParquetSource, sample: int) -> tuple[int, int]:
    red, green, blue = source.image(sample, 3).getpixel((0, 0))  # type: ignore[misc]
    return int(red), int(green) * 256 + int(blue)


@pytest.mark.parametrize("bare", [True, False])
def test_rows_come_file_by_file_at_random(tmp_path: Path, bare: bool) -> None:
    files = [write_parquet(tmp_path / f"{i}.parquet", LABELS[i:], bare=bare) for i in range(3)]
    source = opened(*files)
    expected = [(label, row) for i in range(3) for row, label in enumerate(LABELS[i:])]
    assert source.labels.tolist() == [label for label, _ in expected]
    for sample in np.random.default_rng(0).permutation(len(expected)):
        assert told(source, int(sample)) == expected[sample]
    assert source.where(13) == f"row 2 of {files[1]}"
    assert source.groups is not None
    assert source.groups.tolist() == [0, 4, 8, 11, 15, 19, 21, 25, 29]


def test_names_come_from_hugging_faces_metadata(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "elk"]
    source = opened(write_parquet(tmp_path / "a.parquet", LABELS, names=names))
    assert source.names == source.class_names() == tuple(names)
    bare = opened(write_parquet(tmp_path / "b.parquet", LABELS))
    assert bare.names is None and bare.class_names() == ("0", "1", "2", "3")


def test_labels_may_be_names(tmp_path: Path) -> None:
    files = [write_parquet(tmp_path / f"{i}.parquet", [2, 0, i], texts=True) for i in (0, 1)]
    source = opened(*files)
    assert source.names == ("name0", "name1", "name2")
    assert source.labels.tolist() == [2, 0, 0, 2, 0, 1]
    coded = pq.read_table(files[0])
    coded = coded.set_column(1, "label", coded.column("label").dictionary_encode())
    pq.write_table(coded, tmp_path / "coded.parquet")
    assert opened(tmp_path / "coded.parquet").labels.tolist() == [1, 0, 0]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    table = pa.table({"y": [1, 0], "x": pa.array([d for _, d in pairs([1, 0])], pa.large_binary())})
    table = table.replace_schema_metadata(hugging_face(["a", "b"], "y"))
    pq.write_table(table, tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", image="x", label="y")
    assert source.names == ("a", "b") and told(source, 1) == (0, 1)


def test_memory_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", LABELS * 20, rows=10))
    told(source, 0)
    group = source.kept_bytes
    assert 500 < group < 10_000
    for limit, groups in ((int(3.2 * group), 3), (group // 2, 1)):
        monkeypatch.setattr(parquet, "_KEPT_BYTES", limit)
        fresh, most = copy.copy(source), 0
        for sample in np.random.default_rng(0).permutation(len(source)):
            told(fresh, int(sample))
            most = max(most, fresh.kept_bytes)
        assert (groups - 0.1) * group < most <= max(limit, 1.1 * group)


def counted(source: ParquetSource, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row groups, as they are read."""
    read: list[int] = []
    whole = source._read

    def reading(group: int) -> Any:
        read.append(group)
        return whole(group)

    monkeypatch.setattr(source, "_read", reading)
    return read


def test_the_order_by_row_groups_reads_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", LABELS * 20, rows=10))
    told(source, 0)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", int(9.5 * source.kept_bytes))
    size = len(source)
    for groups, most in ((source.groups, 22), (None, 200)):
        fresh = copy.copy(source)
        read = counted(fresh, monkeypatch)
        order = Order(size, 1, groups)
        assert sorted(told(fresh, order(i))[1] for i in range(size)) == list(range(size))
        assert (len(read) == most == len(set(read))) if most == 22 else (22 < len(read) < most)


def test_the_groups_read_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", LABELS * 2, rows=4))
    told(source, 0)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", int(2.5 * source.kept_bytes))
    read = counted(source, monkeypatch)
    for sample in (4, 0, 8, 1, 4, 8):  # groups 1 0 2 0 1 2: of two, the other one goes
        told(source, sample)
    assert read == [1, 2, 1, 2]


def test_copies_read_for_themselves(tmp_path: Path) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", LABELS))
    told(source, 0)
    for other in (copy.copy(source), pickle.loads(pickle.dumps(source))):
        assert other.kept_bytes == 0 < source.kept_bytes
        assert [told(other, i) for i in range(11)] == [told(source, i) for i in range(11)]
    assert copy.copy(source).labels is source.labels


def failing(message: str, *files: Path, **columns: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(*files, **columns)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", LABELS)
    failing("no column 'img', but image, label; set data.image_column", path, image="img")
    failing("no column 'y', but image, label; set data.label_column", path, label="y")
    failing(r"column label of .*a.parquet holds int64; images are", path, image="label")
    failing(r"column image of .*a.parquet holds struct.*; labels are whole", path, label="image")
    other = write_parquet(tmp_path / "b.parquet", LABELS, names=["a", "b", "c", "d"])
    failing("a.parquet and .*b.parquet do not name the same classes", path, other)
    texts = write_parquet(tmp_path / "c.parquet", LABELS, texts=True)
    failing(r"row 0 of .*c.parquet is 'name3', and that of row 0 of .*a.parquet", path, texts)
    named = pq.read_table(texts).replace_schema_metadata(hugging_face(["a"]))
    pq.write_table(named, texts)
    failing("numbers classes in its metadata, but column label holds texts", texts)
    for metadata in (b"{", b"[]", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'):
        table = pq.read_table(path).replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(table, tmp_path / "d.parquet")
        failing(
            "metadata of the library datasets that do not describe column label",
            tmp_path / "d.parquet",
        )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    failing("a.parquet is damaged, or no Parquet file", path)


def write(path: Path, images: Any, labels: Any) -> Path:
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_rows_without_a_label_or_an_image_are_named(tmp_path: Path) -> None:
    data = encoded(flat(0, 0))
    path = write(tmp_path / "a.parquet", [data, data], pa.array([0, None]))
    failing("row 1 of .*a.parquet has no label in column label", path)
    images = pa.array([{"bytes": data, "path": "x"}, {"bytes": None, "path": "x.png"}, None])
    source = opened(write(tmp_path / "b.parquet", images, [0, 1, 0]))
    for row in (1, 2):
        with pytest.raises(
            LocalError, match=rf"row {row} of .*b.parquet has no bytes in column image"
        ):
            source.image(row, 3)
    source = opened(write(tmp_path / "c.parquet", [data, b"x"], [0, 1]))
    with pytest.raises(LocalError, match=r"row 1 of .*c.parquet holds no image .*: 1 bytes of"):
        source.image(1, 3)
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:20] + bytes(len(whole) - 40) + whole[-20:])
    with pytest.raises(LocalError, match=r"cannot read row group 0 of .*c.parquet: .*damaged"):
        copy.copy(source).image(0, 3)


def test_row_groups_that_fill_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", LABELS)
    monkeypatch.setattr("matformer_dist.data.images.parquet_index._LARGEST_GROUP_BYTES", 100)
    failing("a row group with 0.0 GB of images, .* groups of about 100 rows", path)
