"""The study's text: source of Python, whole files of it held out.

The standard library for what two cores train, and for a GPU the source of every package that is
installed here with it: some thirty times as much.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.study import read
from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.prepare import prepare_data

_PACKAGES = "site-packages"


@dataclass(frozen=True)
class Corpus:
    """Files of folders; every so many of them, in alphabetical order, are held out."""

    folders: tuple[Path, ...]
    held_out: int

    def split(self) -> tuple[list[Path], list[Path]]:
        """The files that are trained on, and those that are not."""
        files = sorted(
            path
            for folder in self.folders
            for path in folder.rglob("*.py")
            if _PACKAGES not in path.relative_to(folder).parts and _is_utf8(path)
        )
        held_out = files[:: self.held_out]
        return sorted({*files} - {*held_out}), held_out


_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CORPORA = {  # by the folder of their token files
    "data": Corpus((_LIBRARY,), held_out=40),
    "packages": Corpus((_LIBRARY, Path(sysconfig.get_paths()["purelib"])), held_out=250),
}


def prefix(config: LanguageConfig) -> Path:
    """Of the token files that it trains on; those of its validation lie beside them."""
    return Path(config.data.train[0][1])


def corpus(config: LanguageConfig) -> Corpus:
    return CORPORA[prefix(config).parent.name]


def prepare(size: str) -> None:
    """Token files for training and validation, where they are not there yet."""
    config = read(size)
    train = prefix(config)
    validation = train.with_name("validation")
    if validation.with_suffix(".idx").exists():
        return
    trained_on, held_out = corpus(config).split()
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    prepare_data(trained_on, train, vocab_size=vocab_size, force=True)
    prepare_data(held_out, validation, tokenizer=train.with_suffix(".model"), force=True)


def _is_utf8(path: Path) -> bool:
    """Some files of the library's tests are not, on purpose."""
    try:
        return path.is_file() and bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False
