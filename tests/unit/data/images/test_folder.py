from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from matformer_dist.data.images.folder import FolderSource
from matformer_dist.errors import LocalError, UserError
from tests.unit.data.images.pictures import encoded, flat, noise, write_folder


def pixel(source: FolderSource, sample: int) -> object:
    return source.image(sample, 3).getpixel((0, 0))


def test_class_folders_come_in_the_order_of_names(tmp_path: Path) -> None:
    write_folder(tmp_path, {"dog": 3, "Zebra": 2, "cat 1": 1})
    source = FolderSource(str(tmp_path))
    assert source.names == ("Zebra", "cat 1", "dog")
    assert source.labels.tolist() == [0, 0, 1, 2, 2, 2]
    found = [pixel(source, sample) for sample in range(len(source))]
    assert found == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (2, 0, 0), (2, 0, 1), (2, 0, 2)]
    assert source.where(3) == str(tmp_path / "dog" / "0000.png")


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "._0000.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    flat(0, 9).save(tmp_path / "a" / "deep" / "er" / "x.PNG")
    (tmp_path / "a" / ".hidden").mkdir()
    flat(0, 8).save(tmp_path / "a" / ".hidden" / "x.png")
    os.symlink(tmp_path / "b", tmp_path / "c")
    source = FolderSource(str(tmp_path))
    assert source.names == ("a", "b", "c")
    assert [pixel(source, i) for i in range(4)] == [(0, 0, 0), (0, 0, 9), (1, 0, 0), (1, 0, 0)]


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    with open(os.fsencode(tmp_path / "b") + b"/\xe4.png", "wb") as file:
        file.write(encoded(flat(1, 7)))
    source = FolderSource(str(tmp_path))
    assert pixel(source, 2) == (1, 0, 7)


def test_folders_without_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images: neither class folders, nor"):
        FolderSource(str(tmp_path))
    write_folder(tmp_path, {"a": 1})
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*/b holds no images \(.bmp,"):
        FolderSource(str(tmp_path))
    flat(0, 0).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"in no class folder \(loose.png\)"):
        FolderSource(str(tmp_path))
    write_folder(tmp_path / "parts" / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "parts" / "Val", {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"holds Val, train, .*name one of them, such as .*/train"):
        FolderSource(str(tmp_path / "parts"))


@pytest.mark.parametrize("target", ["..", ".", "../.."])
def test_links_that_lead_back_are_refused(target: str, tmp_path: Path) -> None:
    """They would be followed until the system gives up, and every image found forty times."""
    write_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "back").symlink_to(target)
    with pytest.raises(UserError, match=r"/a/back is a link to .*, on the way to it"):
        FolderSource(str(tmp_path))


def test_links_to_each_other_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "b").symlink_to("../b")
    assert len(FolderSource(str(tmp_path))) == 3
    (tmp_path / "b" / "a").symlink_to("../a")
    with pytest.raises(UserError, match=r"/a/b/a is a link to .*/a, on the way to it"):
        FolderSource(str(tmp_path))


def test_a_pipe_named_as_an_image_is_not_waited_for(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    os.mkfifo(tmp_path / "b" / "9.png")
    with pytest.raises(LocalError, match=r"b/9.png is named as an image, and is no file"):
        FolderSource(str(tmp_path)).image(2, 3)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 2})
    source = FolderSource(str(tmp_path))
    path = tmp_path / "b" / "0001.png"
    path.write_bytes(encoded(noise(50, 50))[:700])
    with pytest.raises(
        LocalError, match=rf"{path} holds no image that can be decoded: .*leave it out"
    ):
        source.image(2, 3)
    path.write_bytes(encoded(Image.new("F", (2, 2)), "tiff"))
    with pytest.raises(LocalError, match=rf"{path} holds no image .*unknown scale"):
        source.image(2, 3)
    path.unlink()
    with pytest.raises(LocalError, match=rf"cannot read {path}: No such file"):
        source.image(2, 3)
    assert pixel(source, 1) == (1, 0, 0)
