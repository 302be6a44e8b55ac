"""config.json of a Llama-architecture checkpoint as our model's settings, or why it is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.importing.checkpoint_config import (
    invalid_config,
    not_allowed,
    read_config,
    refuse,
    short,
)

_ARCHITECTURE = "LlamaForCausalLM"
_KEYS = {  # ours: theirs
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "kv_channels": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "init_std": "initializer_range",
}
_DEFAULTS = {  # of transformers' LlamaConfig, where a file leaves a key out
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
_ALLOWED: dict[str, tuple[Any, ...]] = {  # keys of what MatLM has in one kind only, or not at all
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
}
_ROPE_KEYS: dict[str, dict[str, str]] = {  # of each type; theirs: ours
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
}
_EVERY_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class LlamaConfig:
    """What config.json says: the model, and the ids that end a text."""

    model: LanguageModelConfig  # vocab_size is set
    eos_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        assert self.model.vocab_size is not None
        return self.model.vocab_size


def read_llama_config(directory: Path) -> LlamaConfig:
    """Read `directory`/config.json.

    UserError where there is none, or it describes what MatLM does not compute: all such keys are
    named, with their values and what is allowed.
    """
    config = read_config(directory)
    found = _missing_or_foreign(config)
    refuse(directory, found or [*not_allowed(config, _ALLOWED), *_rope_faults(config)])
    rope = _rope(config)
    values = {**_DEFAULTS, **config}
    values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
    try:
        model = LanguageModelConfig.model_validate(
            {
                **{ours: values[theirs] for ours, theirs in _KEYS.items()},
                "ffn": "swiglu",
                "norm": "rmsnorm",
                "rope_scaling": _rope_scaling(rope),
            }
        )
    except ValidationError as error:
        raise invalid_config(directory, error, _KEYS) from None
    return LlamaConfig(model, _eos_ids(config.get("eos_token_id", 2)))


def _missing_or_foreign(config: dict[str, Any]) -> list[str]:
    """Why this is no Llama at all, where other keys would say nothing."""
    architectures = config.get("architectures") or [_ARCHITECTURE]
    if architectures != [_ARCHITECTURE]:
        return [f"architectures is {architectures!r}, allowed is ['{_ARCHITECTURE}']"]
    if config.get("model_type") != "llama":
        return [f"model_type is {config.get('model_type')!r}, allowed is 'llama'"]
    needed = [key for key in _KEYS.values() if key not in _DEFAULTS]
    return [f"it does not set {key}" for key in needed if config.get(key) is None]


def _rope_faults(config: dict[str, Any]) -> Iterator[str]:
    """Of rope_parameters, as transformers 5 writes it, and of rope_scaling, as those before."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is not None and not _is_known(rope):
            yield (
                f"{key} is {short(rope)}, allowed is rope_type {' or '.join(_ROPE_KEYS)} with all "
                "that it needs and no more (the same in all layers, over the whole head)"
            )


def _is_known(rope: Any) -> bool:
    """Whether MatLM has these rotary embeddings."""
    if not isinstance(rope, dict) or rope.get("partial_rotary_factor", 1) != 1:
        return False
    own = _ROPE_KEYS.get(_rope_type(rope))
    return own is not None and own.keys() <= rope.keys() <= own.keys() | _EVERY_ROPE


def _rope_type(rope: dict[str, Any]) -> Any:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind if isinstance(kind, str) else None


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling where a file has both, as transformers takes it; rope_theta of either."""
    parameters = config.get("rope_parameters") or {}
    theta = {k: v for k, v in parameters.items() if k == "rope_theta"}
    return {**theta, **(config.get("rope_scaling") or parameters)}


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = _rope_type(rope)
    if kind == "default":
        return None
    return {"kind": kind, **{ours: rope[theirs] for theirs, ours in _ROPE_KEYS[kind].items()}}


def _eos_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    return tuple(i for i in ids if isinstance(i, int))
