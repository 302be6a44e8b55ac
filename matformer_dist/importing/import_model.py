"""From a checkpoint of others to a run directory whose model is nested.

```
                          language_source.py: a Llama      vision_source.py: a ViT
config.json               llama_config.py                  vit_config.py, timm_config.py
tokenizer.*, classes      vocabulary.py                    class_names.py
model*.safetensors        llama_weights.py                 vit_weights.py
  calibration             calibration_text.py              calibration_images.py
```
config.json says what the model is, or why it cannot be imported; weights come a tensor at a time
(checkpoint_weights.py); calibration.py and importance.py tell each layer's neurons, most important
first; run_files.py writes RUN/ with checkpoints/step-0, whole weights. The order of the neurons
changes nothing that XL computes: rows of w_in, w_out and b_in move together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from matformer_dist.checkpoints.new_directory import NewDirectory, check_space
from matformer_dist.counting import count_parameters
from matformer_dist.errors import UserError
from matformer_dist.importing.calibration import Calibration
from matformer_dist.importing.checkpoint_config import read_config
from matformer_dist.importing.importance import activation_weighted, falling, magnitude
from matformer_dist.importing.language_source import LanguageSource
from matformer_dist.importing.options import ImportOptions
from matformer_dist.importing.run_files import write_run
from matformer_dist.importing.source import Source
from matformer_dist.importing.vision_source import VisionSource, is_vision

_AS_IT_IS = ImportOptions()
_OF_NEURONS = ("ffn.w_in", "ffn.b_in", "ffn.w_out")  # one input vector a neuron, where b_in is


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
    options: ImportOptions = _AS_IT_IS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportedModel:
    """Make the checkpoint in `directory`, a Llama or a plain ViT, the run directory `output`.

    The same checkpoint, options and samples give the same weights. Memory: up to four times the
    fp32 weights of a layer, or three times the embedding; with calibration the hidden states of its
    samples too. `progress` is called with weights written and in all. UserError for what cannot be
    imported; nothing is left at `output` then.
    """
    options.check()
    new = NewDirectory(output)
    if "${" in str(output):
        raise UserError(
            f"the output {output} holds '${{', which config files read as a reference; choose "
            "another name"
        )
    kind = VisionSource if is_vision(read_config(directory)) else LanguageSource
    source = kind(directory, output, options)
    config = source.config
    submodel = config.granularities.uniform(config.granularities.largest, config.model.n_layers)
    count = count_parameters(config.model, source.outputs, submodel)
    check_space(output, 4 * count.total)
    if options.calibration:
        source.read_samples()
    _write(new, source, _weights(source, options), progress)
    order = _order_in_words(options.order, source.samples_in_words)
    return ImportedModel(output, count.total, order, source.notices())


def _weights(source: Source, options: ImportOptions) -> Iterator[tuple[str, Tensor]]:
    """Our weights, neurons in their new order, as they are needed: layers from the first on."""
    embedding = source.embedding()
    calibration = source.calibration(embedding) if options.calibration else None
    for name in list(embedding):
        yield f"embedding.{name}", embedding.pop(name)
    for i in range(source.config.model.n_layers):
        layer = source.layer(i)
        if options.order == "importance":
            _put_in_order(layer, calibration)
        for name in list(layer):
            yield f"layers.{i}.{name}", layer.pop(name)
    yield from source.behind_layers()


def _put_in_order(layer: dict[str, Tensor], calibration: Calibration | None) -> None:
    """Move the neurons of a layer's FFN, the most important first."""
    w_in, w_out = layer["ffn.w_in"], layer["ffn.w_out"]
    if calibration is None:
        importance = magnitude(w_in, w_out)
    else:
        importance = activation_weighted(calibration.through(layer), w_out)
    order = falling(importance)
    for name in _OF_NEURONS:
        if name in layer:
            layer[name] = layer[name][order]


def _write(
    new: NewDirectory,
    source: Source,
    weights: Iterator[tuple[str, Tensor]],
    progress: Callable[[int, int], None],
) -> None:
    try:
        with new, torch.no_grad():
            write_run(new.path, source, weights, progress)
            new.publish()
    except OSError as error:
        raise UserError(f"cannot write {new.place}: {error}; choose another output") from None


def _order_in_words(order: str, samples: str) -> str:
    if order == "none":
        return "neurons in the checkpoint's order"
    if not samples:
        return "neurons ordered by the magnitude of their weights"
    return f"neurons ordered by what they add over {samples}"
