from __future__ import annotations

from pathlib import Path

import pytest

from matformer_dist.data.images.classes import FILE, ClassNames, load_class_names
from matformer_dist.errors import UserError

NAMES = ("cat", "dog", "Öl 🐟")


def test_names_come_back_from_the_file_of_a_run(tmp_path: Path) -> None:
    classes = ClassNames(NAMES, "data")
    for name, data in classes.files.items():
        (tmp_path / name).write_bytes(data)
    for path in (tmp_path, tmp_path / FILE):
        again = load_class_names(path)
        assert again.names == NAMES and len(again) == 3
        assert again.digest == classes.digest


def test_the_digest_is_of_the_names_in_their_order() -> None:
    digest = ClassNames(NAMES, "here").digest
    assert digest == ClassNames(NAMES, "there").digest
    assert (
        len({digest, ClassNames(NAMES[::-1], "here").digest, ClassNames(NAMES[:2], "").digest}) == 3
    )
    # Of all runs that there are: the digest of the same names must stay.
    assert ClassNames(("0", "1"), "").digest == (
        "b35800e69f8197d44d9dc70a8e0cd7696ad17046e3dd50e20177d37d6b79aa63"
    )


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "data holds no class; a classifier needs two"),
        (("cat",), "data holds the one class 'cat'; a classifier needs two"),
        (("cat", "dog", "cat"), "'cat' twice; they must all differ"),
        (("cat", ""), "an empty one"),
        (("cat", "d\udce4"), "not valid Unicode; rename it"),
    ],
)
def test_names_that_tell_nothing_are_refused(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ClassNames(names, "data")


def test_files_that_hold_no_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the class names .*classes.json: No such"):
        load_class_names(tmp_path)
    for text in ("", "{}", '["a", 1]', "[nonsense", '"ab"'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r"classes.json does not hold class names"):
            load_class_names(tmp_path)
    (tmp_path / FILE).write_text('["a"]')
    with pytest.raises(UserError, match="one class 'a'"):
        load_class_names(tmp_path)
