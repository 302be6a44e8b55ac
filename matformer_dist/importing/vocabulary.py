"""The tokenizer of an imported model: one with an id for every row of the embedding.

A checkpoint's embedding often has more rows than its tokenizer has tokens: padding to a round
number, or tokens that were added behind it (of chats, say). No row is dropped, which would change
the model's probabilities. The tokenizer gets special tokens instead, as llama.cpp's converter gives
it: no text is ever encoded to them, so every text keeps its ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matformer_dist.data import huggingface_tokenizer
from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError

_LONGEST_NAME = 128  # characters, of a token that the checkpoint names
_CONTROL = 3  # SentencePiece's type of a piece that no text encodes to


def find_tokenizer(directory: Path, chosen: Path | None, vocab_size: int) -> Tokenizer:
    """`chosen`, or the checkpoint's own, with `vocab_size` ids.

    UserError where there is none, or it has more ids than the embedding has rows.
    """
    tokenizer = load_tokenizer(chosen or directory)
    missing = vocab_size - tokenizer.vocab_size
    if missing < 0:
        raise UserError(
            f"the tokenizer {tokenizer.source} has {tokenizer.vocab_size} ids, the embedding in "
            f"{directory} has {vocab_size} rows; give the tokenizer that the model was trained "
            "with by --tokenizer"
        )
    if missing == 0:
        return tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _with_tokens(tokenizer, directory, vocab_size)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _with_pieces(tokenizer, directory, vocab_size)


def beginning(tokenizer: Tokenizer, directory: Path) -> int | None:
    """Id that the checkpoint's own tokenizer puts before texts; None where it puts nothing."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = tokenizer.proto()
        adds = _read(directory / "tokenizer_config.json").get("add_bos_token", True)
        return proto.trainer_spec.bos_id if adds and proto.trainer_spec.bos_id >= 0 else None
    first, *_ = tokenizer.encode_prompt("a")
    return first if first != tokenizer.encode("a")[0] else None


def _with_pieces(
    tokenizer: SentencePieceTokenizer, directory: Path, vocab_size: int
) -> SentencePieceTokenizer:
    """Control pieces behind its own."""
    proto = tokenizer.proto()
    taken = {piece.piece for piece in proto.pieces}
    for _, name in _names(range(len(proto.pieces), vocab_size), taken, directory):
        proto.pieces.add(piece=name, score=0.0, type=_CONTROL)
    proto.trainer_spec.vocab_size = vocab_size
    return SentencePieceTokenizer.of(proto.SerializeToString(deterministic=True), tokenizer.source)


def _with_tokens(
    tokenizer: HuggingFaceTokenizer, directory: Path, vocab_size: int
) -> HuggingFaceTokenizer:
    """Special tokens behind its own; UserError where ids before them are left out."""
    content = json.loads(tokenizer.files[huggingface_tokenizer.FILE])
    for i, name in _names(range(tokenizer.vocab_size, vocab_size), tokenizer.tokens, directory):
        added = {"id": i, "content": name, "special": True, "normalized": False}
        content["added_tokens"].append(
            {**added, "single_word": False, "lstrip": False, "rstrip": False}
        )
    text = json.dumps(content, ensure_ascii=False)
    files = {**tokenizer.files, huggingface_tokenizer.FILE: text.encode()}
    return HuggingFaceTokenizer(files, tokenizer.source)


def _names(ids: range, taken: set[str], directory: Path) -> Iterator[tuple[int, str]]:
    """Ids and names of new tokens, named as the checkpoint names them where that is no other's."""
    names = _added_tokens(directory)
    taken = set(taken)
    for i in ids:
        name = names.get(i, "")
        if name in taken or not _is_name(name):
            name = f"<unused-{i}>"
        while name in taken:
            name = f"<{name}>"
        taken.add(name)
        yield i, name


def _is_name(text: str) -> bool:
    """Whether both kinds of tokenizers can hold it."""
    return 0 < len(text) <= _LONGEST_NAME and text.isprintable()


def _added_tokens(directory: Path) -> dict[int, str]:
    """Names of added tokens by id, from either of the files that transformers has had for them."""
    added = _read(directory / "added_tokens.json")
    names = {i: name for name, i in added.items() if isinstance(i, int)}
    decoder = _read(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdecimal() and len(key) < 10 and isinstance(token, dict):
            names[int(key)] = str(token.get("content", ""))
    return names


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none: names are all that is taken from it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
