"""`hf --nested`: one directory for transformers, of which every submodel runs.

The weights have transformers' names, every layer its exact width. The code that runs a prefix of
them is shipped beside them (shipped_code/), since transformers has no such architecture: hence
types of their own, one for each architecture that it changes, `matformer-llama` and
`matformer-starcoder2` (`matformer` is the `native` format's). config.json has beside the settings
of these:

| nesting          | widths of the granularities, narrowest first, and their names              |
| granularities    | each layer's, by name: what its weights hold, with all that are narrower   |
| submodel         | what runs where nothing else is asked for: all that is held                |
"""

from __future__ import annotations

from pathlib import Path

from matformer_dist.submodels.parts import Export, Source
from matformer_dist.submodels.transformers_format import (
    check_architecture,
    safetensors_of,
    transformers_config,
    transformers_files,
)

_CODE = Path(__file__).parent / "shipped_code"
_FILES = ("configuration_matformer.py", "modeling_matformer.py")


def nested_transformers_export(source: Source) -> Export:
    """UserError where no architecture of transformers is this model's, or its tokenizer is not."""
    check_architecture(source.language_model)
    base = "Llama" if source.language_model.ffn == "swiglu" else "Starcoder2"
    submodel = source.submodel
    nesting = submodel.nesting.truncate(max(submodel.granularities))
    config = {
        **transformers_config(source),
        "architectures": [f"Matformer{base}ForCausalLM"],
        "model_type": f"matformer-{base.lower()}",
        "auto_map": {
            "AutoConfig": f"configuration_matformer.Matformer{base}Config",
            "AutoModelForCausalLM": f"modeling_matformer.Matformer{base}ForCausalLM",
        },
        "nesting": {"widths": list(nesting.widths), "names": list(nesting.names)},
        "granularities": [nesting.names[i] for i in submodel.granularities],
        "submodel": str(submodel),
    }
    code = {name: (_CODE / name).read_text(encoding="utf-8") for name in _FILES}
    return Export(
        safetensors_of(source, submodel.widths),
        {**transformers_files(source, config), **code},
        nested=True,
    )
