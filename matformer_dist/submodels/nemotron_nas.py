"""`hf --sparse`: every layer at its own width, as Nemotron-NAS has it.

transformers has no such architecture; vLLM, SGLang and TensorRT-LLM have, under the name
DeciLMForCausalLM. The weights are a LlamaForCausalLM's without padding. The configuration class
that these engines load by `trust_remote_code`, and a model for transformers itself, are shipped
beside them (shipped_code/).

| block_configs[i]             | read by                                                         |
|------------------------------|-----------------------------------------------------------------|
| attention.n_heads_in_group   | all                                                             |
| attention.no_op, ffn.no_op   | all                                                             |
| ..replace_with_linear        | TensorRT-LLM, llama.cpp's converter                             |
| ffn.ffn_mult                 | all; vLLM where it is there. They round 2/3 ffn_mult D up to a  |
|                              | multiple of 256, so it is given where that is the width         |
| ffn.intermediate_size        | vLLM, where there is no ffn_mult; our model                     |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matformer_dist.errors import UserError
from matformer_dist.submodels.formats import FFN_MULT_STEP, has_llama_architecture
from matformer_dist.submodels.parts import Export, Source
from matformer_dist.submodels.transformers_format import (
    safetensors_of,
    transformers_config,
    transformers_files,
)

_CODE = Path(__file__).parent / "shipped_code"
_FILES = ("configuration_nemotron_nas.py", "modeling_nemotron_nas.py")


def nemotron_nas_export(source: Source) -> Export:
    """UserError where FFN and norm are not Llama's."""
    model = source.language_model
    if not has_llama_architecture(model):
        raise UserError(
            "format hf --sparse (nemotron-nas) holds swiglu with rmsnorm, the model has "
            f"{model.ffn} with {model.norm}; extract with --format native, which has exact "
            "widths, or with --format hf, which pads them"
        )
    config = {
        **transformers_config(source),
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_nemotron_nas.NemotronNasConfig",
            "AutoModelForCausalLM": "modeling_nemotron_nas.DeciLMForCausalLM",
        },
        "block_configs": [_block(source, width) for width in source.submodel.widths],
    }
    code = {name: (_CODE / name).read_text(encoding="utf-8") for name in _FILES}
    return Export(
        safetensors_of(source, source.submodel.widths),
        {**transformers_files(source, config), **code},
        sparse=True,
    )


def _block(source: Source, width: int) -> dict[str, dict[str, Any]]:
    model = source.language_model
    ffn: dict[str, Any] = {
        "no_op": False, "replace_with_linear": False, "intermediate_size": width,
    }  # fmt: skip
    if width % FFN_MULT_STEP == 0:
        ffn["ffn_mult"] = 3 * width / (2 * model.d_model)
    attention = {
        "no_op": False,
        "replace_with_linear": False,
        "n_heads_in_group": model.n_heads // model.kv_heads,
    }
    return {"attention": attention, "ffn": ffn}
