"""README.md of an extracted language model: what it is, how good, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matformer_dist.config_language import LanguageModelConfig
from matformer_dist.submodels.formats import FFN_MULT_STEP
from matformer_dist.submodels.model_card import measured, padded_note, write_card

_HF_LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"""

_NATIVE_LOADING = """\
from matformer_dist.inference.generation import sample

print(sample("PATH", "def ", max_new_tokens=50).text)"""


_SPARSE_LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"""

_NESTED_LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    "PATH", trust_remote_code=True, submodel="{smallest}"
)
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))

model.set_submodel("{submodel}")  # of the same weights; or a list of one name a layer
draft = model.at("{smallest}")  # a model of its own over these weights: no second copy
text = model.generate(**prompt, max_new_tokens=50, do_sample=False, assistant_model=draft)
print(tokenizer.decode(text[0]))"""

_GGUF_LOADING = """\
from llama_cpp import Llama

model = Llama("PATH/model.gguf", verbose=False)
print(model("def ", max_tokens=50)["choices"][0]["text"])"""


def language_card(entry: Mapping[str, Any], model: LanguageModelConfig, vocab_size: int) -> str:
    """See write_card; entry: the content of submodel.json."""
    kind = entry["format"]
    front_matter = ["pipeline_tag: text-generation", "tags:", "- matformer", "- nested"]
    if kind == "hf":
        front_matter.insert(0, "library_name: transformers")
    if kind == "gguf":
        front_matter.append("- gguf")
    loading = {"native": _NATIVE_LOADING, "hf": _HF_LOADING, "gguf": _GGUF_LOADING}[kind]
    if entry["sparse"]:
        loading = _SPARSE_LOADING
    if entry["nested"]:
        smallest = entry["nesting"]["names"][0]
        loading = _NESTED_LOADING.format(smallest=smallest, submodel=entry["submodel"])
    heads = f"{model.n_heads} ({model.kv_heads})"
    return write_card(
        entry,
        "language model",
        front_matter=front_matter,
        shape={
            "layers, width, heads (key-value)": f"{model.n_layers}, {model.d_model}, {heads}",
            "context": f"{model.max_seq_len} tokens",
            "vocabulary": f"{vocab_size} pieces",
        },
        measures={"validation loss": measured(entry["loss"], "{:.4f} nats per token")},
        sections=_widths_note(entry),
        loading=loading,
    )


def _widths_note(entry: Mapping[str, Any]) -> str:
    """What a reader must know of an architecture whose layers differ, or may not."""
    if entry["padded_width"] is not None:
        return padded_note(
            entry, "The formats `native`, `hf --sparse`, `hf --nested` and `gguf` have"
        )
    if entry["nested"]:
        return (
            "\nThe weights hold every submodel that is nowhere wider. The two Python files run "
            "them in transformers, where code is trusted: `submodel=` as the model loads, "
            "`set_submodel` and `at` later. A narrower one takes less time, not less memory; "
            f"the names are {', '.join(_held_names(entry))}.\n"
        )
    if not entry["sparse"]:
        return ""
    note = (
        "\nThe architecture is that of Nemotron-NAS (`DeciLMForCausalLM`), with a width of its own "
        "in every layer. The two Python files describe it to transformers, and their "
        "configuration to vLLM, SGLang and TensorRT-LLM: they run where code is trusted "
        "(`--trust-remote-code`).\n"
    )
    if any(width % FFN_MULT_STEP for width in entry["widths"]):
        note += (
            f"\nA width here is not a multiple of {FFN_MULT_STEP}: vLLM reads it, SGLang and "
            "TensorRT-LLM do not.\n"
        )
    return note


def _held_names(entry: Mapping[str, Any]) -> list[str]:
    """Granularities that the widest layer holds."""
    nesting = entry["nesting"]
    return nesting["names"][: nesting["widths"].index(max(entry["widths"])) + 1]
