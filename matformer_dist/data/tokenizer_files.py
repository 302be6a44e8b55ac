"""Which file is which tokenizer."""

from __future__ import annotations

from pathlib import Path

from matformer_dist.data import huggingface_tokenizer, sentencepiece_tokenizer
from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError

_LOADERS = {
    sentencepiece_tokenizer.FILE: SentencePieceTokenizer.load,
    huggingface_tokenizer.FILE: HuggingFaceTokenizer.load,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A .model file of SentencePiece, a tokenizer.json, or the folder of one.

    A folder with both gives its tokenizer.model. UserError where there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    load = HuggingFaceTokenizer.load if path.suffix == ".json" else SentencePieceTokenizer.load
    return load(path)


def _in_folder(folder: Path) -> Path:
    for name in _LOADERS:
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f"{folder} holds no tokenizer: neither {' nor '.join(_LOADERS)} is there; give one of them"
    )
