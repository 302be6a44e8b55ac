"""Llama with a width of its own in every layer, under the names of Nemotron-NAS.

`block_configs[i].attention` and `.ffn` describe layer i; engines ask for their settings by
attributes, and whether there is one by `hasattr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig


class Settings(dict[str, Any]):
    """A dictionary, so that it can be saved as JSON, whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNasConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[Mapping[str, Any]] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.block_configs = [
            Settings({part: Settings(values) for part, values in block.items()})
            for block in block_configs
        ]
