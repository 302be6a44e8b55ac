"""Tokenizers as files of transformers that give the same ids for every text.

A tokenizer.json is one already, and goes with all that its tokenizer_config.json sets for prompts.
SentencePiece writes a space as U+2581, so a literal U+2581 is ambiguous, and readers that work
with that character turn it into a space. Here pieces hold spaces themselves: a space is a space,
and a literal U+2581 is spelled in bytes, as our own tokenizer does. Special pieces in a text
("</s>") are text, as for SentencePiece.
"""

from __future__ import annotations

import json
from typing import Any

from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError

_SPACE = "▁"  # U+2581
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, str | bytes]:
    """tokenizer.json, what belongs to it, the original; UserError where ids could not be equal."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return dict(tokenizer.files)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    proto = exact_pieces(tokenizer, "transformers")
    names = [piece.piece for piece in proto.pieces]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "bos_token": names[tokenizer.eod],
        "eos_token": names[tokenizer.eod],
        "unk_token": names[proto.trainer_spec.unk_id],
        "pad_token": names[proto.trainer_spec.unk_id],
        "padding_side": "left",  # as what generates needs it
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {
        **tokenizer.files,
        "tokenizer.json": json.dumps(_tokenizer_json(proto), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def pad_id(tokenizer: Tokenizer) -> int | None:
    """The id that fills up batches; None where the tokenizer's own files say, or nothing does.

    That of the unknown piece, which no text has, since bytes are pieces: trainers that leave
    padding out of the loss would leave the end of a document out with it, if that were the padding.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        unknown: int = tokenizer.proto().trainer_spec.unk_id
        return unknown
    return None


def exact_pieces(tokenizer: SentencePieceTokenizer, reader: str) -> Any:
    """The SentencePiece model; UserError where `reader` could not give the same ids."""
    proto = tokenizer.proto()
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    reasons = {
        "it is not a BPE model": trainer.model_type != _BPE,
        "it has no byte pieces": not trainer.byte_fallback,
        "it normalises text": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "it marks spaces behind words": trainer.treat_whitespace_as_suffix,
        "it has user-defined pieces": any(
            piece.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in proto.pieces
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(
            f"the tokenizer {tokenizer.source} cannot be written for {reader} with the same ids: "
            f"{', '.join(found)}; extract with --format native, which ships it as it is"
        )
    return proto


def _tokenizer_json(proto: Any) -> dict[str, Any]:
    pieces = [
        piece.piece.replace(_SPACE, " ") if piece.type == _NORMAL else piece.piece
        for piece in proto.pieces
    ]
    special = [i for i, piece in enumerate(proto.pieces) if piece.type in (_UNKNOWN, _CONTROL)]
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer = None
    if proto.normalizer_spec.add_dummy_prefix:
        to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        prepend = {"type": "Prepend", "prepend": " "}
        normalizer = {"type": "Sequence", "normalizers": [prepend, to_space]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": pieces[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in special
        ],
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[proto.trainer_spec.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(proto, pieces),
        },
    }


def _merges(proto: Any, pieces: list[str]) -> list[list[str]]:
    """Pairs in the order in which they merge: SentencePiece takes the neighbours whose piece has
    the highest score, whichever they are.
    """
    normal = {
        pieces[i]: piece.score for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL
    }
    return [
        [piece[:cut], piece[cut:]]
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
