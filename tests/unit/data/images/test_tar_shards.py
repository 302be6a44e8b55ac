from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest

from matformer_dist.data.images.tar_shards import TarSource
from matformer_dist.errors import LocalError, UserError
from tests.unit.data.images.pictures import encoded, flat, noise, write_shard, write_tar


def opened(*files: Path, label: str = "label") -> TarSource:
    return TarSource("data", [str(file) for file in files], label)


def told(source: TarSource, sample: int) -> tuple[int, int]:
    red, green, blue = source.image(sample, 3).getpixel((0, 0))  # type: ignore[misc]
    return int(red), int(green) * 256 + int(blue)


def picture(label: int, number: int) -> bytes:
    return encoded(flat(label, number))


def test_samples_come_shard_by_shard_at_random(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 5, 300).tolist()
    files = [write_shard(tmp_path / f"{i}.tar", labels[100 * i :][:100], 100 * i) for i in range(3)]
    source = opened(*files)
    assert source.labels.tolist() == labels and source.names is None
    assert source.class_names() == ("0", "1", "2", "3", "4")
    for sample in np.random.default_rng(1).permutation(300):
        assert told(source, int(sample)) == (labels[sample], sample)
    assert source.where(123) == f"s/000123.png in {files[1]}"


def test_parts_are_found_in_any_order_and_place(tmp_path: Path) -> None:
    jpeg = encoded(flat(0, 0), "jpeg", quality=100)
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("readme", b"no part of a sample"),
            ("x/1.cls", b" 2\n"), ("x/1.txt", b"a cat"), ("x/1.JPG", jpeg),
            ("y/1.json", b'{"label": 1, "more": []}'), ("y/1.webp", encoded(flat(1, 1), "webp")),
            ("./a.b/2.png", picture(0, 2)), ("./a.b/2.cls", b"0"), ("./a.b/2.json", b"broken"),
            ("._x.png", b"x"),
        ],
    )  # fmt: skip
    source = opened(path)
    assert source.labels.tolist() == [2, 1, 0]
    assert told(source, 2) == (0, 2)
    assert [source.image(i, 3).size for i in range(3)] == [(6, 6)] * 3


def test_labels_in_json_may_be_names(tmp_path: Path) -> None:
    members = []
    for number, name in enumerate(["dog", "ant", "dog"]):
        members += [
            (f"{number}.json", f'{{"species": "{name}", "label": 9}}'.encode()),
            (f"{number}.png", picture(0, number)),
        ]
    source = opened(write_tar(tmp_path / "a.tar", members), label="species")
    assert source.names == ("ant", "dog") and source.labels.tolist() == [1, 0, 1]
    assert [told(source, i)[1] for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("1.png", b"x")], "the sample 1 in .*a.tar has no label; it needs a part .cls"),
        ([("1.cls", b"0")], r"the sample 1 in .*a.tar has 0 images among its parts \(cls\)"),
        ([("1.png", b"x"), ("1.jpg", b"x"), ("1.cls", b"0")], r"has 2 images .*\(png, jpg, cls\)"),
        ([("1.png", b"x"), ("1.PNG", b"x")], "the sample 1 in .* has two parts .png"),
        (
            [("1.png", b"x"), ("1.cls", b"cat")],
            "label of the sample 1 in .* is b'cat'; it must be a n",
        ),
        ([("1.png", b"x"), ("1.cls", b"")], "is b''; it must be a number$"),
        ([("1.png", b"x"), ("1.json", b"{")], "JSON object with 'label', a number or a name"),
        ([("1.png", b"x"), ("1.json", b"[3]")], "JSON object with 'label'"),
        ([("1.png", b"x"), ("1.json", b'{"y": 3}')], r"is b'\{\"y\": 3\}'; .*data.label_column"),
        ([("1.png", b"x"), ("1.json", b'{"label": true}')], "it must be a JSON object"),
        ([("1.png", b"x"), ("1.json", b'{"label": 1.5}')], "it must be a JSON object"),
        (
            [("1.png", b"x"), ("1.cls", b"0"), ("2.png", b"x"), ("2.json", b'{"label": "a"}')],
            "label of 2.png in .*a.tar is 'a', and that of 1.png in .*a.tar is 0; .*all be numbers",
        ),
        ([("1.png", b"x"), ("1.cls", b"9" * 30)], "1.png in .* is 9999.*; number classes from 0"),
    ],
)
def test_samples_that_lack_a_part_are_named(
    tmp_path: Path, members: list[tuple[str, bytes]], says: str
) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=says):
        opened(path)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [0, 1, 2])
    whole = path.read_bytes()
    for data in (gzip.compress(whole), b"not a tar file" * 99, whole[:600]):
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=r"a.tar is damaged, or no tar file: .*not be compressed"
        ):
            opened(path)


@pytest.mark.parametrize("rest", [0, 100])
def test_shards_that_are_cut_at_a_header_are_named(rest: int, tmp_path: Path) -> None:
    """tarfile takes what is left for all of it."""
    path = write_shard(tmp_path / "a.tar", [0, 1, 2])
    with tarfile.open(path) as tar:
        end = tar.getmember("s/000002.png").offset
    path.write_bytes(path.read_bytes()[: end + rest])
    with pytest.raises(UserError, match=rf"a.tar is cut off, or damaged, at byte {end}: .*again"):
        opened(path)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    members = [("a/1.png", encoded(noise(50, 50))[:800]), ("a/1.cls", b"0")]
    path = write_tar(tmp_path / "a.tar", [*members, ("a/2.png", picture(0, 1)), ("a/2.cls", b"1")])
    source = opened(path)
    with pytest.raises(
        LocalError, match=rf"^a/1.png in {path} holds no image that can be decoded: "
    ):
        source.image(0, 3)
    assert told(source, 1) == (0, 1)
    path.write_bytes(path.read_bytes()[:2600])
    with pytest.raises(LocalError, match=rf"{path} has become shorter since the run began"):
        source.image(1, 3)
    path.unlink()
    with pytest.raises(LocalError, match=rf"cannot read the image at byte \d+ in {path}: No such"):
        source.image(1, 3)
