"""The `native` format: exact widths, weights under our own names, read by our own loader.

Its config.json: `model_type` "matformer", `format`, `model` (the section of a run's settings),
`outputs` (tokens or classes), `nesting` (widths and names up to the widest layer's),
`granularities` (each layer's name), `dtype`. An extracted model is nested still: layer i holds
every granularity up to its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pydantic

from matformer_dist.config_file import AnyModelConfig
from matformer_dist.errors import UserError
from matformer_dist.nesting import Nesting, Submodel
from matformer_dist.submodels.parts import Export, Part, Parts, Source, layer_of, rows_within
from matformer_dist.submodels.safetensors_files import SafetensorsFiles

FORMAT = 2
_READ = (1, 2)  # 1 knew language models alone, and said vocab_size for outputs
_MODEL: pydantic.TypeAdapter[AnyModelConfig] = pydantic.TypeAdapter(AnyModelConfig)


@dataclass(frozen=True)
class NativeModel:
    """What config.json of a native directory says."""

    model: AnyModelConfig
    outputs: int
    submodel: Submodel

    @property
    def nestings(self) -> list[Nesting]:
        """Each layer's nesting, for the model."""
        return [self.submodel.nesting.truncate(i) for i in self.submodel.granularities]


def native_export(source: Source) -> Export:
    """Weights as they are: those of an FFN are prefixes of rows."""
    return Export(
        SafetensorsFiles(_parts(source), source.torch_dtype, source.shard_bytes),
        {
            "config.json": json.dumps(_config(source), indent=2) + "\n",
            **source.labels.files,
        },
    )


def _parts(source: Source) -> Parts:
    parts = {}
    for name, whole in source.universal.whole.items():
        layer = layer_of(name)
        rows = whole.shape[0]
        if layer is not None:
            rows = rows_within(source.universal, name, source.submodel.widths[layer]) or rows
        parts[name] = [Part(name, (rows, *whole.shape[1:]), itemgetter(slice(rows)))]
    return parts


def _config(source: Source) -> dict[str, Any]:
    universal, submodel = source.universal, source.submodel
    nesting = submodel.nesting.truncate(max(submodel.granularities))
    return {
        "model_type": "matformer",
        "format": FORMAT,
        "model": {**universal.model.model_dump(mode="json"), "d_ff": nesting.d_ff},
        "outputs": universal.outputs,
        "nesting": {"widths": list(nesting.widths), "names": list(nesting.names)},
        "granularities": [nesting.names[i] for i in submodel.granularities],
        "dtype": source.dtype,
    }


def read_native_config(directory: Path) -> NativeModel:
    """UserError where the directory is not a native one, or of another version's format."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
        if config["model_type"] != "matformer" or config["format"] not in _READ:
            raise UserError(
                f"{path} describes a model of type {config['model_type']!r}, format "
                f"{config.get('format')!r}; this version of matformer_dist reads type "
                f"'matformer', format {FORMAT}"
            )
        nesting = Nesting.from_widths(config["nesting"]["widths"], config["nesting"]["names"])
        granularities = tuple(nesting.index(name) for name in config["granularities"])
        model = _MODEL.validate_python(config["model"])
        outputs = config["outputs" if config["format"] == FORMAT else "vocab_size"]
        return NativeModel(model, outputs, Submodel(nesting, granularities))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pydantic.ValidationError) as error:
        raise UserError(
            f"{directory} is not an extracted native model: cannot read {path} "
            f"({type(error).__name__}: {error}); extract the model again"
        ) from None
