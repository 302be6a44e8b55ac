"""Nested models of matformer_dist, for transformers: which widths there are, and which one runs.

`nesting` has the `widths` of the granularities, narrowest first, and their `names`;
`granularities` names the one that each layer's weights hold; `submodel` is what runs of it, in the
notation of `set_submodel` (see modeling_matformer.py), or None for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import LlamaConfig, Starcoder2Config

_COUNT = re.compile(r"0*[1-9][0-9]{0,4}")  # of layers


def _without_ffn(plan: Mapping[str, str]) -> dict[str, str]:
    """A tensor-parallel plan that leaves FFNs whole: no rank's rows would begin with a prefix's."""
    return {name: how for name, how in plan.items() if ".mlp." not in name}


class NestedConfig:
    """What both architectures share. transformers makes attributes of all settings it is given."""

    nesting: dict[str, Any]
    granularities: Sequence[str]
    submodel: str | Sequence[str] | None = None

    def parse(self, submodel: str | Sequence[str] | None) -> list[str]:
        """The granularity of each layer, by name.

        ValueError for a submodel that is none of this model, or wider than what its weights hold.
        """
        held = list(self.granularities)
        names = held if submodel is None else self._names(submodel)
        known = self.nesting["names"]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"submodel {submodel!r}: there is no granularity {name!r} here; the names are "
                    f"{', '.join(known)}"
                )
        if len(names) != len(held):
            raise ValueError(
                f"submodel {submodel!r} covers {len(names)} layers, the model has {len(held)}; "
                "give a name for all layers, runs of layers such as S:8,M:8, or a list of one name "
                "a layer"
            )
        if any(known.index(a) > known.index(b) for a, b in zip(names, held, strict=True)):
            raise ValueError(
                f"submodel {submodel!r} is wider than this model, which holds {notation(held)}; "
                "choose one that is nowhere wider"
            )
        return names

    def width(self, name: str) -> int:
        """FFN neurons of the granularity called `name`."""
        return int(self.nesting["widths"][self.nesting["names"].index(name)])

    def _names(self, submodel: str | Sequence[str]) -> list[str]:
        if not isinstance(submodel, str):
            return list(submodel) if isinstance(submodel, Sequence) else [submodel]
        if submodel.strip() in self.nesting["names"]:
            return [submodel.strip()] * len(self.granularities)
        names = []
        for run in submodel.split(","):
            name, colon, count = (word.strip() for word in run.partition(":"))
            if colon and not _COUNT.fullmatch(count):
                raise ValueError(
                    f"submodel {submodel!r}: {run.strip()!r} needs a whole number of layers above "
                    "0 behind the colon, as in S:8,M:8"
                )
            names += [name] * (int(count) if colon else 1)
        return names


class MatformerLlamaConfig(NestedConfig, LlamaConfig):
    model_type = "matformer-llama"
    base_model_tp_plan = _without_ffn(LlamaConfig.base_model_tp_plan)


class MatformerStarcoder2Config(NestedConfig, Starcoder2Config):
    model_type = "matformer-starcoder2"
    base_model_tp_plan = _without_ffn(Starcoder2Config.base_model_tp_plan)


def notation(names: Sequence[str]) -> str:
    """[S, S, M] as "S:2,M:1"; [M, M] as "M"."""
    if len(set(names)) == 1:
        return names[0]
    return ",".join(f"{name}:{len(list(run))}" for name, run in groupby(names))
