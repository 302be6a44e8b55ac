"""The study's text: source of Python, whole files of it held out.

The standard library for what two cores train, and for a GPU the source of every package that is
installed here with it: some thirty times as much.
"""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.study import read
from matformer_dist.checkpoints.files import replace_file
from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.prepare import prepare_data

_PACKAGES = "site-packages"
_LINE = 25  # characters
_MOST_KNOWN = 0.5
_MOST_BYTES = 200_000
_SEQUENCES = 8  # of validation data, a multiple of it
_CALIBRATION_FILES = 8


@dataclass(frozen=True)
class Corpus:
    """Files of folders; every so many of them, in alphabetical order, are not trained on."""

    folders: tuple[Path, ...]
    held_out: int

    def trained_on(self) -> list[Path]:
        files = self._files()
        return sorted({*files} - {*files[:: self.held_out]})

    def split(self) -> tuple[list[Path], list[Path]]:
        """The files that are trained on, and of the others those that tell something: none that is
        for the most part in the former too, as tables of encodings are, and none so large that it
        would be much of the whole.
        """
        trained_on, others = self.trained_on(), self._files()[:: self.held_out]
        known = {line for file in trained_on for line in _lines(file)}
        return trained_on, [
            file
            for file in others
            if file.stat().st_size <= _MOST_BYTES and _share_of(_lines(file), known) < _MOST_KNOWN
        ]

    def _files(self) -> list[Path]:
        return sorted(
            path
            for folder in self.folders
            for path in folder.rglob("*.py")
            if _PACKAGES not in path.relative_to(folder).parts and _is_utf8(path)
        )


def _lines(file: Path) -> list[str]:
    """Those long enough to say something."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if len(line) >= _LINE]


def _share_of(lines: list[str], known: set[str]) -> float:
    """In characters."""
    whole = sum(map(len, lines))
    return sum(len(line) for line in lines if line in known) / whole if whole else 0.0


_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CORPORA = {  # by the folder of their token files
    "data": Corpus((_LIBRARY,), held_out=40),
    "packages": Corpus((_LIBRARY, Path(sysconfig.get_paths()["purelib"])), held_out=250),
}


def prefix(config: LanguageConfig) -> Path:
    """Of the token files that it trains on; those of its validation are beside them."""
    return Path(config.data.train[0][1])


def corpus(config: LanguageConfig) -> Corpus:
    return CORPORA[prefix(config).parent.name]


def described(config: LanguageConfig) -> dict[str, object]:
    """What it trains on, and how much is held out."""
    data = json.loads(prefix(config).with_suffix(".json").read_text())
    said = {key: data[key] for key in ("tokens", "documents", "tokenizer_sha256")}
    return {**said, "held_out_tokens": _held_out_tokens(config)}


def calibration(config: LanguageConfig) -> Path:
    """Some of what it trains on, as text."""
    path = prefix(config).with_name("calibration.txt")
    if not path.exists():
        files = corpus(config).trained_on()
        some = files[:: len(files) // _CALIBRATION_FILES]
        text = "\n".join(file.read_text(encoding="utf-8") for file in some)
        replace_file(path, text.encode())
    return path


def validation_batches(config: LanguageConfig) -> int:
    """All that is held out but what fills no batch, and as many sequences whatever the batch."""
    sequences = (_held_out_tokens(config) - 1) // config.training.seq_len
    return sequences // _SEQUENCES * _SEQUENCES // config.training.global_batch_size


def _held_out_tokens(config: LanguageConfig) -> int:
    return int(json.loads(_held_out(config).with_suffix(".json").read_text())["tokens"])


def _held_out(config: LanguageConfig) -> Path:
    return prefix(config).with_name("validation")


def prepare(size: str) -> None:
    """Token files for training and validation, where they are not there yet."""
    config = read(size)
    train = prefix(config)
    validation = _held_out(config)
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
