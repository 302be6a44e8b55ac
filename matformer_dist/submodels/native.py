"""The `native` format: exact widths, weights under MatLM's own names, read by our own loader.

Its config.json: `model_type` "matformer", `format`, `model` (ModelConfig), `vocab_size`,
`nesting` (widths and names up to the widest layer's), `granularities` (each layer's name),
`eos_token_id`, `dtype`. An extracted model is nested still: layer i holds every granularity up
to its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pydantic

from matformer_dist.config import ModelConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, Submodel
from matformer_dist.submodels.parts import Export, Part, Parts, Source, layer_of
from matformer_dist.submodels.safetensors_files import SafetensorsFiles

FORMAT = 1


@dataclass(frozen=True)
class NativeModel:
    """What config.json of a native directory says."""

    model: ModelConfig
    vocab_size: int
    submodel: Submodel
    eod: int

    @property
    def nestings(self) -> list[Nesting]:
        """Each layer's nesting, for MatLM."""
        return [self.submodel.nesting.truncate(i) for i in self.submodel.granularities]


def native_export(source: Source) -> Export:
    """MatLM's own weights: those of an FFN are prefixes of rows."""
    return Export(
        SafetensorsFiles(_parts(source), source.torch_dtype, source.shard_bytes),
        {
            "config.json": json.dumps(_config(source), indent=2) + "\n",
            **source.tokenizer.files,
        },
    )


def _parts(source: Source) -> Parts:
    parts = {}
    for name, whole in source.universal.whole.items():
        layer = layer_of(name)
        rows = whole.shape[0]
        if layer is not None and ".ffn." in name:
            rows = source.submodel.widths[layer]
        parts[name] = [Part(name, (rows, *whole.shape[1:]), itemgetter(slice(rows)))]
    return parts


def _config(source: Source) -> dict[str, Any]:
    universal, submodel = source.universal, source.submodel
    nesting = submodel.nesting.truncate(max(submodel.granularities))
    return {
        "model_type": "matformer",
        "format": FORMAT,
        "model": {**universal.model.model_dump(mode="json"), "d_ff": nesting.d_ff},
        "vocab_size": universal.vocab_size,
        "nesting": {"widths": list(nesting.widths), "names": list(nesting.names)},
        "granularities": [nesting.names[i] for i in submodel.granularities],
        "eos_token_id": source.tokenizer.eod,
        "dtype": source.dtype,
    }


def read_native_config(directory: Path) -> NativeModel:
    """UserError where the directory is not a native one, or of another version's format."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
        if config["model_type"] != "matformer" or config["format"] != FORMAT:
            raise UserError(
                f"{path} describes a model of type {config['model_type']!r}, format "
                f"{config.get('format')!r}; this version of matformer_dist reads type "
                f"'matformer', format {FORMAT}"
            )
        nesting = Nesting.from_widths(config["nesting"]["widths"], config["nesting"]["names"])
        granularities = tuple(nesting.index(name) for name in config["granularities"])
        model = ModelConfig.model_validate(config["model"])
        return NativeModel(
            model, config["vocab_size"], Submodel(nesting, granularities), config["eos_token_id"]
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pydantic.ValidationError) as error:
        raise UserError(
            f"{directory} is not an extracted native model: cannot read {path} "
            f"({type(error).__name__}: {error}); extract the model again"
        ) from None
