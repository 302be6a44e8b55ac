"""From a Hugging Face checkpoint to a run directory whose model is nested.

```
config.json          llama_config.py     what the model is, or why it cannot be imported
tokenizer.*          vocabulary.py       an id for every row of the embedding
model*.safetensors   llama_weights.py    a tensor at a time, as MatLM's
  calibration text   calibration.py, importance.py    each layer's neurons, most important first
-> RUN/              run_files.py        checkpoints/step-0, whole weights
```
The order of the neurons changes nothing that XL computes: rows of w_in and w_out move together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matformer_dist.checkpoints.new_directory import NewDirectory, check_space
from matformer_dist.config_file import validate_config
from matformer_dist.config_language import LanguageConfig, as_language
from matformer_dist.counting import count_parameters
from matformer_dist.data.huggingface_tokenizer import HuggingFaceTokenizer
from matformer_dist.data.tokenizer import Tokenizer
from matformer_dist.data.tokenizer_files import load_tokenizer
from matformer_dist.errors import UserError
from matformer_dist.importing.calibration import Calibration, read_tokens
from matformer_dist.importing.importance import activation_weighted, falling, magnitude
from matformer_dist.importing.llama_config import LlamaConfig, read_llama_config
from matformer_dist.importing.llama_weights import LlamaWeights
from matformer_dist.importing.run_files import write_run
from matformer_dist.importing.vocabulary import beginning, find_tokenizer

ORDERS = ("importance", "none")
CALIBRATION_TOKENS = 8192
_SEQ_LEN = 2048


@dataclass(frozen=True)
class ImportOptions:
    """What a user may choose; `fractions`, `widths` and `names` are the nesting's.

    order        importance: neurons by falling importance; none: as they are in the checkpoint
    calibration  files or folders of text to measure importance on; without, weights alone count
    text_key     the key or column of calibration that holds the text
    tokenizer    another than the one beside the checkpoint, see load_tokenizer
    seq_len      training.seq_len, and the length of calibration's sequences
    """

    fractions: Sequence[str] | None = None
    widths: Sequence[int] | None = None
    names: Sequence[str] | None = None
    order: str = "importance"
    calibration: Sequence[Path] = ()
    calibration_tokens: int | None = None  # CALIBRATION_TOKENS, where there is text
    text_key: str = "text"
    tokenizer: Path | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class ImportedModel:
    """What was written, and what its user should know."""

    run: Path
    parameters: int
    order: str  # in words
    notices: list[str] = field(default_factory=list)


def import_model(
    directory: Path,
    output: Path,
    options: ImportOptions = ImportOptions(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportedModel:
    """Make the Llama-architecture checkpoint in `directory` the run directory `output`.

    The same checkpoint, options and text give the same weights. Memory: up to four times the
    fp32 weights of a layer, or three times the embedding; with calibration the hidden states of its
    tokens too. `progress` is called
    with weights written and in all. UserError for what cannot be imported; nothing is left at
    `output` then.
    """
    _check_options(options)
    new = NewDirectory(output)
    if "${" in str(output):
        raise UserError(
            f"the output {output} holds '${{', which config files read as a reference; choose "
            "another name"
        )
    described = read_llama_config(directory)
    source = LlamaWeights(directory, described.model, described.vocab_size)
    tokenizer = find_tokenizer(directory, options.tokenizer, described.vocab_size)
    config = _config(described, options, output, tokenizer)
    submodel = config.granularities.uniform(config.granularities.largest, config.model.n_layers)
    count = count_parameters(config.model, tokenizer.vocab_size, submodel)
    check_space(output, 4 * count.total)
    tokens = None
    if options.calibration:
        tokens = _calibration_tokens(options, tokenizer, config.training.seq_len)
    weights = _weights(source, config, options.order, tokens)
    _write(new, config, tokenizer, weights, progress)
    notices = _notices(directory, described, tokenizer, options, tokens)
    return ImportedModel(output, count.total, _order_in_words(options.order, tokens), notices)


def _check_options(options: ImportOptions) -> None:
    if options.order not in ORDERS:
        raise UserError(f"--order {options.order!r} must be one of {', '.join(ORDERS)}")
    if options.order == "none" and options.calibration:
        raise UserError(
            "--order none keeps the checkpoint's order of neurons, so --calibration would change "
            "nothing; leave one of the two out"
        )
    if options.calibration_tokens is not None and not options.calibration:
        raise UserError(
            f"--calibration-tokens {options.calibration_tokens} needs text to take them from; give "
            "it by --calibration, or leave both out"
        )
    if options.fractions is not None and options.widths is not None:
        raise UserError("--fractions and --widths are both given; keep one")


def _config(
    described: LlamaConfig, options: ImportOptions, output: Path, tokenizer: Tokenizer
) -> LanguageConfig:
    """The run's settings; UserError where the nesting or seq_len does not fit the model."""
    model = described.model
    nesting: dict[str, Any] = {
        "fractions": options.fractions if options.fractions is None else [*options.fractions],
        "widths": options.widths if options.widths is None else [*options.widths],
        "names": options.names if options.names is None else [*options.names],
    }
    if options.fractions is None and options.widths is None:
        nesting["fractions"] = ["1/8", "1/4", "1/2", 1]
    seq_len = options.seq_len
    if seq_len is None:
        seq_len = min(_SEQ_LEN, model.max_seq_len)
    tree = {
        "run": {"dir": str(output)},
        "model": model.model_dump(),
        "nesting": nesting,
        "data": {"train": [[1.0, "unset"]], "tokenizer": str(output / tokenizer.file_name)},
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 100, "min_lr": 1e-5},
        "training": {
            "steps": 1000,
            "seq_len": seq_len,
            "micro_batch_size": 1,
            "global_batch_size": 64,
        },
    }
    config = validate_config(tree, source="the imported model's configuration")
    return as_language(config, "import")


def _calibration_tokens(options: ImportOptions, tokenizer: Tokenizer, seq_len: int) -> Tensor:
    try:
        return read_tokens(
            options.calibration, tokenizer, _asked(options), seq_len, options.text_key
        )
    except UserError as error:
        raise UserError(
            f"the calibration text cannot be used: {error} (of the options of `matformer "
            "prepare-data`, import has --text-key)"
        ) from None


def _asked(options: ImportOptions) -> int:
    count = options.calibration_tokens
    return CALIBRATION_TOKENS if count is None else count


def _weights(
    source: LlamaWeights, config: LanguageConfig, order: str, tokens: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """MatLM's weights, neurons in their new order, as they are needed: layers from the first on."""
    embedding = source.embedding()
    calibration = None
    if tokens is not None:
        calibration = Calibration(config.model, tokens, embedding)
    yield "embedding.weight", embedding
    del embedding
    for i in range(config.model.n_layers):
        layer = source.layer(i)
        if order == "importance":
            _put_in_order(layer, calibration)
        for name in list(layer):
            yield f"layers.{i}.{name}", layer.pop(name)
    yield "final_norm.weight", source.final_norm()
    if not config.model.tied_embeddings:
        yield "head.weight", source.head()


def _put_in_order(layer: dict[str, Tensor], calibration: Calibration | None) -> None:
    """Move the neurons of a layer's FFN, the most important first."""
    w_in, w_out = layer["ffn.w_in"], layer["ffn.w_out"]
    if calibration is None:
        importance = magnitude(w_in, w_out)
    else:
        importance = activation_weighted(calibration.through(layer), w_out)
    order = falling(importance)
    for name in ("ffn.w_in", "ffn.w_out"):
        layer[name] = layer[name][order]


def _write(
    new: NewDirectory,
    config: LanguageConfig,
    tokenizer: Tokenizer,
    weights: Iterator[tuple[str, Tensor]],
    progress: Callable[[int, int], None],
) -> None:
    try:
        with new, torch.no_grad():
            write_run(new.path, config, tokenizer, weights, progress)
            new.publish()
    except OSError as error:
        raise UserError(f"cannot write {new.place}: {error}; choose another output") from None


def _order_in_words(order: str, tokens: Tensor | None) -> str:
    if order == "none":
        return "neurons in the checkpoint's order"
    if tokens is None:
        return "neurons ordered by the magnitude of their weights"
    return f"neurons ordered by what they add over {tokens.numel():,} tokens of calibration text"


def _notices(
    directory: Path,
    described: LlamaConfig,
    tokenizer: Tokenizer,
    options: ImportOptions,
    tokens: Tensor | None,
) -> list[str]:
    notices = []
    if tokens is not None and tokens.numel() <= _asked(options) // 2:
        notices.append(
            f"the calibration text gave {tokens.numel():,} tokens, {_asked(options):,} were asked "
            "for"
        )
    if described.eos_ids and tokenizer.eod not in described.eos_ids:
        notices.append(
            f"config.json ends texts with id {', '.join(map(str, described.eos_ids))}, the run's "
            f"documents end with the tokenizer's end, id {tokenizer.eod}"
        )
    begins = beginning(tokenizer, directory)
    if begins is not None:
        kept = isinstance(tokenizer, HuggingFaceTokenizer)
        notices.append(
            f"the checkpoint's texts begin with id {begins}; documents in prepared data begin with "
            f"nothing{'' if kept else ', and so do prompts here and of extracted models'}"
        )
    if tokenizer.digest != load_tokenizer(tokenizer.source).digest:
        notices.append(
            f"the run's {tokenizer.file_name} has tokens added up to the embedding's "
            f"{tokenizer.vocab_size} rows; prepare data with it, not with the original"
        )
    return notices
