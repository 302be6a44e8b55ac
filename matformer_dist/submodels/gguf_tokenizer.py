"""Tokenizers as settings of a GGUF file that give llama.cpp the same ids.

SentencePiece: but for what its own text form cannot tell apart. A literal U+2581 is a space to
llama.cpp, and "</s>" in a text is the end of a document where the vocabulary has pieces that merge
to it.

Byte-level BPE: llama.cpp has the rule that cuts a text into words as code, under a name. So a file
whose rule has no name here is refused, rather than given another's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from matformer_dist.data import huggingface_tokenizer
from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError
from matformer_dist.submodels.transformers_tokenizer import exact_pieces

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# llama.cpp's name of a rule: its pre-tokenizers in a tokenizer.json.
_RULES: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [
        {**_SPLIT, "pattern": {"Regex": _LLAMA3_WORDS}},
        {**_BYTES, "use_regex": False},
    ],
    "smollm": [_DIGITS, {**_BYTES, "use_regex": True}],
    "gpt-2": [{**_BYTES, "use_regex": True}],
}


def gguf_tokenizer(tokenizer: Tokenizer) -> Callable[[Any], None]:
    """What tells a GGUFWriter of `tokenizer`; UserError where ids could not be equal."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _byte_level(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _sentencepiece(tokenizer)


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Callable[[Any], None]:
    """A document begins behind the end of another, and nothing is put before a text."""
    pieces = exact_pieces(tokenizer, "llama.cpp")

    def describe(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.piece for piece in pieces.pieces])
        writer.add_token_scores([piece.score for piece in pieces.pieces])
        writer.add_token_types([piece.type for piece in pieces.pieces])  # as SentencePiece's
        writer.add_bos_token_id(tokenizer.eod)
        writer.add_eos_token_id(tokenizer.eod)
        writer.add_unk_token_id(pieces.trainer_spec.unk_id)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(pieces.normalizer_spec.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(False)

    return describe


def _byte_level(tokenizer: HuggingFaceTokenizer) -> Callable[[Any], None]:
    content = json.loads(tokenizer.files[huggingface_tokenizer.FILE])
    rule = _rule(tokenizer, content)
    tokens = [f"[unused-{i}]" for i in range(tokenizer.vocab_size)]  # ids that no token has
    types = [_UNUSED] * tokenizer.vocab_size
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in content["added_tokens"]:
        kind = _CONTROL if added["special"] else _USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]
    before = tokenizer.encode_prompt("a")[: -len(tokenizer.encode("a"))]

    def describe(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(before[0] if before else tokenizer.eod)
        writer.add_eos_token_id(tokenizer.eod)
        writer.add_add_bos_token(bool(before))
        writer.add_add_eos_token(False)

    return describe


def _rule(tokenizer: HuggingFaceTokenizer, content: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that cuts a text into words."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    names = [name for name, rule in _RULES.items() if steps == rule]
    text, around = tokenizer.encode("a"), tokenizer.encode_prompt("a")
    reasons = {
        "its model is not BPE": content["model"].get("type") != "BPE",
        "it normalises text": content.get("normalizer") is not None,
        f"it cuts words by none of the rules {', '.join(_RULES)}": not names,
        "its ignore_merges is not that rule's": names
        and bool(content["model"].get("ignore_merges")) != (names == ["llama-bpe"]),
        "it puts more than one token around a text": len(around) > len(text) + 1
        or around[-len(text) :] != text,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(
            f"the tokenizer {tokenizer.source} cannot be written for llama.cpp with the same ids: "
            f"{', '.join(wrong)}; extract with --format hf or native, which ship it as it is"
        )
    return names[0]
