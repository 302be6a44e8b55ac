"""Real image files for the tests, small and all different."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from matformer_dist.config_images import ImageDataConfig

SIZE = 6
# Of flat pictures: values come back as they were.
PLAIN: dict[str, Any] = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


Picture = Callable[[int, int], Image.Image]  # of a label and a number


def flat(label: int, number: int) -> Image.Image:
    """One colour that tells which picture it is."""
    return Image.new("RGB", (SIZE, SIZE), (label, number // 256, number % 256))


def rough(label: int, number: int) -> Image.Image:
    """Colours that augmentation of two pictures never makes the same."""
    draw = np.random.default_rng([label, number]).integers(0, 256, (SIZE, SIZE, 3))
    return Image.fromarray(draw.astype(np.uint8))


def told(image: Tensor) -> tuple[int, int]:
    """(label, number) of a flat picture, after PLAIN preprocessing."""
    red, green, blue = (image[:, 0, 0] * 255).round().to(torch.int64).tolist()
    return red, green * 256 + blue


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Blurred, so that resizing it says something."""
    draw = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    small = Image.fromarray(draw.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_folder(folder: Path, counts: Mapping[str, int], picture: Picture = flat) -> Path:
    """Class folders of so many pictures; the labels are those of the sorted names."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(label, number).save(folder / name / f"{number:04}.png")
    return folder


def pairs(labels: Sequence[int], picture: Picture = flat) -> list[tuple[int, bytes]]:
    """(label, file) of pictures, numbered."""
    return [(label, encoded(picture(label, number))) for number, label in enumerate(labels)]


def hugging_face(names: Sequence[str], column: str = "label") -> dict[bytes, bytes]:
    """The schema's metadata, as the library `datasets` writes it."""
    features = {"image": {"_type": "Image"}, column: {"names": list(names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    path: Path,
    labels: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    rows: int = 4,
    bare: bool = False,
    texts: bool = False,
    picture: Picture = flat,
) -> Path:
    """Pictures, `rows` to a row group; bare: bytes instead of {bytes, path}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [data for _, data in pairs(labels, picture)]
    images: Any = pa.array(files, pa.binary())
    if not bare:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows_of = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(files)]
        images = pa.array(rows_of, kind)
    given: Any = pa.array(labels, pa.int64())
    if texts:
        given = [f"name{label}" for label in labels]
    table = pa.table({"image": images, "label": given})
    if names is not None:
        table = table.replace_schema_metadata(hugging_face(names))
    pq.write_table(table, path, row_group_size=rows)
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shard(path: Path, labels: Sequence[int], first: int = 0, picture: Picture = flat) -> Path:
    """A shard of WebDataset: pictures, numbered from `first`, beside .cls."""
    members = []
    numbered = pairs([0] * first + list(labels), picture)
    for number, (label, data) in enumerate(numbered[first:], first):
        members += [(f"s/{number:06}.png", data), (f"s/{number:06}.cls", str(label).encode())]
    return write_tar(path, members)


def plain_config(train: object, **keys: Any) -> ImageDataConfig:
    return ImageDataConfig(train=str(train), **{**PLAIN, **keys})
