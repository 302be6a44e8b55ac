"""The study's text: the source of the Python standard library, whole files of it held out."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from benchmarks.quality.study import RUNS, SMALL, read
from matformer_dist.data.prepare import prepare_data

DATA = RUNS / "data"
_HELD_OUT = 40  # every such file


def prepare() -> None:
    """Token files for training and validation, where they are not there yet."""
    if (DATA / "validation.idx").exists():
        return
    trained_on, held_out = split()
    vocab_size = read(SMALL).model.vocab_size
    assert vocab_size is not None
    prepare_data(trained_on, DATA / "train", vocab_size=vocab_size, force=True)
    prepare_data(held_out, DATA / "validation", tokenizer=DATA / "train.model", force=True)


def split() -> tuple[list[Path], list[Path]]:
    """The files that are trained on, and those that are not."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in library.rglob("*.py")
        if "site-packages" not in path.parts and _is_utf8(path)
    )
    held_out = files[::_HELD_OUT]
    return sorted({*files} - {*held_out}), held_out


def _is_utf8(path: Path) -> bool:
    """Some files of the library's tests are not, on purpose."""
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False
