"""The tokenizer of an imported model: a SentencePiece model with a piece for every embedding row.

A checkpoint's embedding often has more rows than its tokenizer.model has pieces: padding to a
round number, or tokens that were added behind it (of chats, say). No row is dropped, which would
change the model's probabilities. The tokenizer gets control pieces instead, as llama.cpp's
converter gives it: no text is ever encoded to them, so every text keeps its ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.run_directory import TOKENIZER

_CONTROL = 3  # SentencePiece's type of a piece that no text encodes to


def find_tokenizer(directory: Path, chosen: Path | None, vocab_size: int) -> Tokenizer:
    """`chosen`, or the checkpoint's own tokenizer.model, with `vocab_size` pieces.

    UserError where there is none, or it has more pieces than the embedding has rows.
    """
    path = chosen or directory / TOKENIZER
    if chosen is None and not path.exists():
        raise UserError(_without_sentencepiece(directory))
    tokenizer = Tokenizer.load(path)
    missing = vocab_size - tokenizer.vocab_size
    if missing < 0:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} pieces, the embedding in {directory} "
            f"has {vocab_size} rows; give the tokenizer that the model was trained with by "
            "--tokenizer"
        )
    return tokenizer if missing == 0 else _filled_up(tokenizer, directory, vocab_size)


def _without_sentencepiece(directory: Path) -> str:
    other = (directory / "tokenizer.json").exists()
    held = "only tokenizer.json, which" if other else "no tokenizer.model, which"
    reason = "is not read here" if other else "is needed here"
    return (
        f"{directory} has {held} {reason}: calibration, training, extract and generate work with "
        "SentencePiece models alone, so without one there is nothing that an import would be good "
        "for. If the model has a SentencePiece tokenizer (Llama 1 and 2 and their kin do), give "
        "its tokenizer.model by --tokenizer; models with a byte-level BPE tokenizer (Llama 3) "
        "cannot be imported"
    )


def _filled_up(tokenizer: Tokenizer, directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer with control pieces behind its own, named as the checkpoint names them."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.model)
    taken = {piece.piece for piece in proto.pieces}
    names = _added_tokens(directory)
    for i in range(len(proto.pieces), vocab_size):
        name = names.get(i, "")
        if not name or name in taken:
            name = f"<unused-{i}>"
        taken.add(name)
        proto.pieces.add(piece=name, score=0.0, type=_CONTROL)
    proto.trainer_spec.vocab_size = vocab_size
    return Tokenizer(proto.SerializeToString(deterministic=True), tokenizer.source)


def _added_tokens(directory: Path) -> dict[int, str]:
    """Names of added tokens by id, from either of the files that transformers has had for them."""
    added = _read(directory / "added_tokens.json")
    names = {i: name for name, i in added.items() if isinstance(i, int)}
    decoder = _read(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdecimal() and isinstance(token, dict):
            names[int(key)] = str(token.get("content", ""))
    return names


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none: names are all that is taken from it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
