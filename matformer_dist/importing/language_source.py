"""A Llama-architecture checkpoint of Hugging Face, as an import reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.importing.calibration import Calibration
from matformer_dist.importing.calibration_text import of_tokens, read_tokens
from matformer_dist.importing.llama_config import LlamaConfig, read_llama_config
from matformer_dist.importing.llama_weights import LlamaWeights
from matformer_dist.importing.options import ImportOptions
from matformer_dist.importing.source import Source, run_config
from matformer_dist.importing.vocabulary import beginning, find_tokenizer

CALIBRATION_TOKENS = 8192
_SEQ_LEN = 2048
_NOTE = """\
# An imported model. Set data.train to the data sets to go on with, for example
# [[1.0, data/corpus]], prepared with {tokenizer}.
# Length, batch and learning rate below are where to begin, not advice.
"""


class LanguageSource(Source):
    config: LanguageConfig
    labels: Tokenizer

    def __init__(self, directory: Path, output: Path, options: ImportOptions) -> None:
        """UserError for what cannot be imported, and where options do not fit it."""
        options.check_task(directory, "language")
        self.directory, self.options = directory, options
        self.described = read_llama_config(directory)
        vocab_size = self.described.vocab_size
        self.weights = LlamaWeights(directory, self.described.model, vocab_size)
        self.labels = find_tokenizer(directory, options.tokenizer, vocab_size)
        self.outputs = self.labels.vocab_size
        self.config = _config(self.described, options, output, self.labels)
        self.note = _NOTE.format(tokenizer=self.config.data.tokenizer)
        self.tokens: Tensor | None = None

    def read_samples(self) -> None:
        options, seq_len = self.options, self.config.training.seq_len
        try:
            self.tokens = read_tokens(
                options.calibration, self.labels, self._asked, seq_len, options.text_key
            )
        except UserError as error:
            raise UserError(
                f"the calibration text cannot be used: {error} (of the options of `matformer "
                "prepare-data`, import has --text-key)"
            ) from None

    @property
    def _asked(self) -> int:
        count = self.options.calibration_tokens
        return CALIBRATION_TOKENS if count is None else count

    @property
    def samples_in_words(self) -> str:
        return "" if self.tokens is None else f"{self.tokens.numel():,} tokens of calibration text"

    def embedding(self) -> dict[str, Tensor]:
        return {"weight": self.weights.embedding()}

    def calibration(self, embedding: dict[str, Tensor]) -> Calibration:
        assert self.tokens is not None
        return of_tokens(self.config.model, self.tokens, embedding["weight"])

    def layer(self, i: int) -> dict[str, Tensor]:
        return self.weights.layer(i)

    def behind_layers(self) -> Iterator[tuple[str, Tensor]]:
        yield "final_norm.weight", self.weights.final_norm()
        if not self.config.model.tied_embeddings:
            yield "head.weight", self.weights.head()

    def notices(self) -> list[str]:
        notices, tokenizer = [], self.labels
        if self.tokens is not None and self.tokens.numel() <= self._asked // 2:
            notices.append(
                f"the calibration text gave {self.tokens.numel():,} tokens, {self._asked:,} were "
                "asked for"
            )
        eos_ids = self.described.eos_ids
        if eos_ids and tokenizer.eod not in eos_ids:
            notices.append(
                f"config.json ends texts with id {', '.join(map(str, eos_ids))}, the run's "
                f"documents end with the tokenizer's end, id {tokenizer.eod}"
            )
        begins = beginning(tokenizer, self.directory)
        if begins is not None:
            kept = isinstance(tokenizer, HuggingFaceTokenizer)
            notices.append(
                f"the checkpoint's texts begin with id {begins}; documents in prepared data begin "
                f"with nothing{'' if kept else ', and so do prompts here and of extracted models'}"
            )
        if tokenizer.digest != load_tokenizer(tokenizer.source).digest:
            notices.append(
                f"the run's {tokenizer.file_name} has tokens added up to the embedding's "
                f"{tokenizer.vocab_size} rows; prepare data with it, not with the original"
            )
        return notices


def _config(
    described: LlamaConfig, options: ImportOptions, output: Path, tokenizer: Tokenizer
) -> LanguageConfig:
    """The run's settings; UserError where the nesting or seq_len does not fit the model."""
    seq_len = options.seq_len
    if seq_len is None:
        seq_len = min(_SEQ_LEN, described.model.max_seq_len)
    tree = {
        "model": described.model.model_dump(),
        "data": {"train": [[1.0, "unset"]], "tokenizer": str(output / tokenizer.file_name)},
        "training": {
            "steps": 1000,
            "seq_len": seq_len,
            "micro_batch_size": 1,
            "global_batch_size": 64,
        },
    }
    return as_language(run_config(tree, output, options), "import")
