"""The formats of an extracted model, and the name of its directory.

Without torch: the report, which only prints commands, asks here what `extract` would do.
"""

from __future__ import annotations

from matformer_dist.config import ModelConfig
from matformer_dist.nesting import Submodel

FORMATS = ("native", "hf")


def has_transformers_architecture(model: ModelConfig) -> bool:
    """Whether some architecture of transformers is this model's, so that format hf can hold it."""
    return (model.ffn, model.norm) in (("swiglu", "rmsnorm"), ("gelu", "layernorm"))


def directory_name(submodel: Submodel | str) -> str:
    """ "S:2,M:2" as "Sx2-Mx2"; no text, wherever it was read, leads out of the parent."""
    return str(submodel).replace(":", "x").replace(",", "-").replace("/", "-")
