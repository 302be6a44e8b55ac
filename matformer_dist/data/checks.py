"""Checks of data sets before training starts, cheap however large they are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from matformer_dist.config_language import LanguageConfig
from matformer_dist.data.indexed_files import IndexedFiles, open_indexed
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.errors import UserError

_READ_IDS = 1 << 24  # of foreign data; of more, evenly spaced runs are read
_RUN_IDS = 1 << 14
_LARGEST_DESCRIPTION_BYTES = 1 << 24

Blend = Sequence[tuple[float, str]]


def check_data(config: LanguageConfig, tokenizer: Tokenizer, validation_samples: int) -> None:
    """Check all data sets of a configuration.

    UserError for files that are missing or damaged, ids that are not of `tokenizer`, parts too
    small for one sample, and validation data that hold less than `validation_samples`: they are
    not counted twice.
    """
    data, sample = config.data, config.training.seq_len + 1
    blends = [*data.train, *(data.validation or [])]
    opened = {prefix: open_indexed(prefix) for _, prefix in blends}
    for files in opened.values():
        _check_ids(files, tokenizer)
    train_share = split_share(config)
    for _, prefix in data.train:
        _check_part(opened[prefix], "training", 0.0, train_share, sample)
    if validation_samples:
        blend, start = (
            (data.train, train_share) if data.validation is None else (data.validation, 0.0)
        )
        tokens = [
            _check_part(opened[prefix], "validation", start, 1.0, sample) for _, prefix in blend
        ]
        weights = [weight for weight, _ in blend]
        _check_validation(config, validation_samples, tokens, weights)


def _check_validation(
    config: LanguageConfig, wanted: int, tokens: Sequence[int], weights: Sequence[float]
) -> None:
    """UserError unless data sets of so many tokens, blended, hold `wanted` different samples."""
    batch = config.training.global_batch_size
    margin = 1.005 if len(weights) > 1 else 1.0  # which Megatron-Core adds to each of a blend
    shares = [weight / sum(weights) for weight in weights]
    held = [(count - 1) // config.training.seq_len for count in tokens]

    def fits(samples: int) -> bool:
        return all(
            math.ceil(math.ceil(samples * share) * margin) <= count
            for share, count in zip(shares, held, strict=True)
        )

    if fits(wanted):
        return
    most = next((n for n in range(sum(held) // batch, 0, -1) if fits(n * batch)), 0)
    remedy = f"ask for at most {most} batches (evaluation.batches), or " if most else ""
    blended = " in all, blended by weight" if len(weights) > 1 else ""
    raise UserError(
        f"evaluation takes {wanted:,} samples ({wanted // batch} batches of "
        f"training.global_batch_size {batch}), and the validation data hold {sum(held):,} of "
        f"training.seq_len {config.training.seq_len} tokens{blended}; {remedy}give validation a "
        "larger share in data.split, or more data"
    )


def split_share(config: LanguageConfig) -> float:
    """Share of data.train's documents that are for training; validation has the others."""
    if config.data.validation is not None:
        return 1.0
    train, validation = config.data.split
    return train / (train + validation)


def _check_part(files: IndexedFiles, purpose: str, start: float, stop: float, sample: int) -> int:
    """Tokens of the documents between two shares of a data set; UserError if not one sample."""
    documents = len(files.lengths)
    first, last = round(start * documents), round(stop * documents)  # as Megatron-Core rounds
    tokens = int(files.lengths[first:last].sum(dtype=np.int64))
    if tokens >= sample:
        return tokens
    remedy = "add text, or set a smaller training.seq_len"
    if purpose == "validation":
        remedy = "give validation a larger share in data.split, or set data.validation to data sets"
    raise UserError(
        f"the data set {files.prefix} is too small for {purpose}: {last - first} of its "
        f"{documents} documents, with {tokens} tokens, fall to it, and one sample takes {sample} "
        f"(training.seq_len + 1); {remedy}"
    )


def _check_ids(files: IndexedFiles, tokenizer: Tokenizer) -> None:
    """By the digest in PREFIX.json where we prepared the data; else by reading ids."""
    made_by = _described_tokenizer(files)
    if made_by == tokenizer.digest:
        return
    if made_by is not None:
        raise UserError(
            f"the data set {files.prefix} was made with another tokenizer (SHA-256 "
            f"{made_by[:12]}...) than data.tokenizer {tokenizer.source} "
            f"({tokenizer.digest[:12]}...); set data.tokenizer to the one it was made with, or "
            "prepare the data again"
        )
    if files.dtype.kind not in "iu":
        raise UserError(f"the data set {files.prefix} holds {files.dtype}, not token ids")
    ids = files.token_ids()
    runs = [ids]
    if len(ids) > _READ_IDS:
        starts = np.linspace(0, len(ids) - _RUN_IDS, _READ_IDS // _RUN_IDS).astype(np.int64)
        runs = [ids[start : start + _RUN_IDS] for start in starts]
    low, high = min(run.min() for run in runs), max(run.max() for run in runs)
    if low < 0 or high >= tokenizer.vocab_size:
        raise UserError(
            f"the data set {files.prefix} holds token id {high if low >= 0 else low}, but the "
            f"tokenizer {tokenizer.source} has ids 0 to {tokenizer.vocab_size - 1}; set "
            "data.tokenizer to the one it was made with"
        )


def _described_tokenizer(files: IndexedFiles) -> str | None:
    """The tokenizer's digest in PREFIX.json; None where that is not a file of ours."""
    path = Path(f"{files.prefix}.json")
    try:
        if path.stat().st_size > _LARGEST_DESCRIPTION_BYTES:
            return None
        described = json.loads(path.read_bytes())
        digest, counts = (
            described["tokenizer_sha256"],
            (described["documents"], described["tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if counts != (len(files.lengths), files.tokens):
        raise UserError(
            f"{path} describes {counts[0]} documents of {counts[1]} tokens, but the data set "
            f"beside it has {len(files.lengths)} of {files.tokens}; prepare it again, or delete "
            f"{path} if it belongs to another"
        )
    return str(digest)
