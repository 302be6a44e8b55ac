"""Byte-level BPE tokenizers as Hugging Face keeps them, trained here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_WORDS = (  # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _words_of(rule: str) -> Any:
    if rule == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == "smollm")
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if rule == "smollm"
        else pre_tokenizers.Split(Regex(_WORDS), "isolated")
    )
    return pre_tokenizers.Sequence([first, by_bytes])


def save_tokenizer(
    directory: Path,
    texts: Sequence[str],
    vocab_size: int,
    rule: str = "llama-bpe",
    begins: bool = True,
) -> Path:
    """tokenizer.json and tokenizer_config.json with `vocab_size` ids, the last two BOS and EOS.

    `begins`: whether a prompt begins with BOS, as Llama 3's do.
    """
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    made.pre_tokenizer = _words_of(rule)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([BOS, EOS])
    assert made.get_vocab_size() == vocab_size, "more text would be needed"
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
        )
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory / "tokenizer.json"


def byte_level_tokenizer(
    directory: Path, texts: Sequence[str], vocab_size: int, rule: str = "llama-bpe"
) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.load(save_tokenizer(directory, texts, vocab_size, rule))
