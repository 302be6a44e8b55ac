"""README.md of an extracted model: what it is, how large, how good, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matformer_dist.config import ModelConfig

_CARD = """\
---
{front_matter}
---

# {submodel} of a MatFormer language model

Taken out of a trained universal model by slicing, without training: step {step} of the run
`{run}`.

| | |
|---|---|
| submodel | {submodel} |
| FFN width of each layer | {widths} |
| parameters | {parameters:,} |
| without embeddings and head | {non_embedding_parameters:,} |
| layers, width, heads (key-value) | {n_layers}, {d_model}, {n_heads} ({kv_heads}) |
| context | {max_seq_len} tokens |
| vocabulary | {vocab_size} pieces |
| weights | {dtype}, {bytes:,} bytes, from training's {trained} |
| validation loss | {loss} |
{padding}
## How to load it

```{language}
{loading}
```
"""

_HF_LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"""

_NATIVE_LOADING = """\
from matformer_dist.inference.generation import sample

print(sample("PATH", "def ", max_new_tokens=50).text)"""


_COPIED = ("submodel", "step", "run", "parameters", "dtype", "bytes", "trained")


def model_card(entry: Mapping[str, Any], model: ModelConfig, vocab_size: int) -> str:
    """The card of the model that `entry`, the content of submodel.json, describes."""
    is_hf = entry["format"] == "hf"
    front_matter = ["pipeline_tag: text-generation", "tags:", "- matformer", "- nested"]
    if is_hf:
        front_matter.insert(0, "library_name: transformers")
    loss = "not measured" if entry["loss"] is None else f"{entry['loss']:.4f} nats per token"
    padding = ""
    if entry["padded_width"] is not None:
        padding = (
            f"\nThe architecture has one FFN width, so narrower layers are padded to "
            f"{entry['padded_width']} neurons with zeros: the result is exactly the same, memory "
            "and time are those of the padded width. The `native` format has the exact widths.\n"
        )
    return _CARD.format(
        **{key: entry[key] for key in _COPIED},
        front_matter="\n".join(front_matter),
        widths=_runs(entry["widths"]),
        non_embedding_parameters=entry["non_embedding_parameters"],
        n_layers=model.n_layers,
        d_model=model.d_model,
        n_heads=model.n_heads,
        kv_heads=model.kv_heads,
        max_seq_len=model.max_seq_len,
        vocab_size=vocab_size,
        loss=loss,
        padding=padding,
        language="python",
        loading=_HF_LOADING if is_hf else _NATIVE_LOADING,
    )


def _runs(widths: list[int]) -> str:
    """[256, 256, 512] as "2 x 256, 1 x 512"."""
    runs: list[list[int]] = []
    for width in widths:
        if runs and runs[-1][1] == width:
            runs[-1][0] += 1
        else:
            runs.append([1, width])
    return ", ".join(f"{count} x {width}" for count, width in runs)
