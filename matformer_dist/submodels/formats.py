"""The formats of an extracted model, their dtypes, and the name of its directory.

Without torch: the report, which only prints commands, asks here what `extract` would do.
"""

from __future__ import annotations

import hashlib

from matformer_dist.config import ModelConfig
from matformer_dist.config_vision import VisionModelConfig
from matformer_dist.nesting import Submodel

_FLOATS = ("fp32", "bf16", "fp16")
DTYPES = {  # by format
    "native": _FLOATS,
    "hf": _FLOATS,
    "gguf": (*_FLOATS, "q8_0"),
    "timm": _FLOATS,
}
FORMATS = tuple(DTYPES)
_LONGEST_NAME, _SHORTENED_NAME = 120, 60  # bytes, characters
TIMM_NORM_EPS = 1e-6  # of timm's LayerNorm; no argument that JSON holds is another
FFN_MULT_STEP = 256  # neurons: widths that `ffn_mult` of format hf, sparse, can say


def has_transformers_architecture(model: ModelConfig) -> bool:
    """Whether some architecture of transformers is this model's, so that format hf can hold it."""
    starcoder = (model.ffn, model.norm) == ("gelu", "layernorm")
    return has_llama_architecture(model) or (starcoder and model.attention_width == model.d_model)


def has_plain_heads(model: ModelConfig) -> bool:
    """Whether attention is as that of other programs' ViTs is."""
    return model.kv_heads == model.n_heads and model.attention_width == model.d_model


def usual_format(model: ModelConfig) -> str:
    """hf, which most programs read, where it can hold the model; else timm, or our own."""
    if isinstance(model, VisionModelConfig):
        if not has_plain_heads(model):
            return "native"
        if model.pooling == "token":
            return "hf"
        return "timm" if model.norm_eps == TIMM_NORM_EPS else "native"
    return "hf" if has_transformers_architecture(model) else "native"


def has_llama_architecture(model: ModelConfig) -> bool:
    """Whether Llama's is this model's: what engines with a width per layer are made for."""
    return (model.ffn, model.norm) == ("swiglu", "rmsnorm")


def directory_name(submodel: Submodel | str) -> str:
    """ "S:2,M:2" as "Sx2-Mx2"; no text, wherever it was read, leads out of the parent.

    A long name ends in a digest, since file systems hold 255 bytes.
    """
    name = str(submodel).replace(":", "x").replace(",", "-").replace("/", "-")
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(str(submodel).encode()).hexdigest()[:8]
    return f"{name[:_SHORTENED_NAME]}-{digest}"
