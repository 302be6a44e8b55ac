"""Directories that appear whole or not at all, whatever is at their place."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from matformer_dist.checkpoints.new_directory import NewDirectory, must_be_free
from matformer_dist.errors import UserError


def replaceable(place: Path) -> None:
    if (place / "precious").exists():
        raise UserError("precious")


def make(
    place: Path,
    write: Callable[[Path], object] = lambda new: (new / "file").touch(),
    check: Callable[[Path], None] = must_be_free,
) -> None:
    with NewDirectory(place, check) as new:
        write(new.path)
        new.publish()


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_it_appears_with_its_parents_when_it_is_published(tmp_path: Path) -> None:
    with NewDirectory(tmp_path / "a/b/new") as new:
        (new.path / "file").write_text("new")
        assert new.path.parent == tmp_path / "a/b" and not (tmp_path / "a/b/new").exists()
        new.publish()
        assert names(tmp_path) == {"a", "a/b", "a/b/new", "a/b/new/file"}
    assert names(tmp_path) == {"a", "a/b", "a/b/new", "a/b/new/file"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("x"), OSError("x")])
def test_nothing_is_left_of_one_that_fails(tmp_path: Path, error: BaseException) -> None:
    def fail(new: Path) -> None:
        (new / "file").touch()
        raise error

    (tmp_path / "a").mkdir()
    with pytest.raises(type(error)):
        make(tmp_path / "a/b/new", fail)
    assert names(tmp_path) == {"a"}


def test_an_empty_folder_is_taken_and_anything_else_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    for place in (tmp_path / "empty", tmp_path / "empty/file"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            NewDirectory(place)
    with pytest.raises(UserError, match=r"cannot write .*file/new: .*empty/file is no folder"):
        NewDirectory(tmp_path / "empty/file/new")
    assert names(tmp_path) == {"empty", "empty/file"}


def test_links_stand_for_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/empty").mkdir()
    for name in ("empty", "none"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        make(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name / "file").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((UserError, OSError)):
        make(tmp_path / "loop")
    assert names(tmp_path / "disk") == {"empty", "empty/file", "none", "none/file"}


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write_there_too(new: Path) -> None:
        place = new.parent / "new"
        place.mkdir(exist_ok=True)
        (place / ("precious" if any(place.iterdir()) else "thesis.tex")).touch()

    with pytest.raises(UserError, match="not an empty folder"):
        make(tmp_path / "new", write_there_too)
    assert names(tmp_path) == {"new", "new/thesis.tex"}
    with pytest.raises(UserError, match="precious"):
        make(tmp_path / "new", write_there_too, replaceable)
    assert names(tmp_path) == {"new", "new/thesis.tex", "new/precious"}


def test_what_is_replaced_comes_back_where_the_new_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_other(new: Path) -> None:
        (new / "other").touch()

    place = tmp_path / "new"
    make(place)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".incomplete"):
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="broken"):
            make(place, write_other, replaceable)
    assert names(tmp_path) == {"new", "new/file"}
    make(place, write_other, replaceable)
    assert names(tmp_path) == {"new", "new/other"}


@pytest.mark.parametrize(
    ("place", "says"), [(".", "no name"), ("..", "no name"), ("a" * 256, "than 255")]
)
def test_names_that_cannot_be_are_refused_at_once(place: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        NewDirectory(Path(place))


def test_long_names_are_made(tmp_path: Path) -> None:
    make(tmp_path / ("é" * 127))
    assert len(names(tmp_path)) == 2


def test_a_mount_point_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"/dev/shm is a mount point.*, for example /dev/shm/new"):
        NewDirectory(Path("/dev/shm"), check=lambda _: None)
