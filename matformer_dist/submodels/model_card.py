"""README.md of an extracted model, as the cards of all tasks have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

_CARD = """\
---
{front_matter}
---

# {submodel} of a MatFormer {model}

Taken out of a universal model by slicing, without training: step {step} of the run
`{run}`.

| | |
|---|---|
{table}
{sections}
## How to load it

```python
{loading}
```
"""


def write_card(
    entry: Mapping[str, Any],
    model: str,
    *,
    front_matter: Sequence[str],
    shape: Mapping[str, str],
    measures: Mapping[str, str],
    sections: str,
    loading: str,
) -> str:
    """The card of the model that `entry`, the content of submodel.json, describes.

    model: its kind in words; shape and measures: rows of the table by what they tell; sections:
    what stands between the table and how to load it, as lines of Markdown.
    """
    rows = {
        "submodel": entry["submodel"],
        "FFN width of each layer": _width_runs(entry["widths"]),
        "parameters": f"{entry['parameters']:,}",
        "without embedding and head": f"{entry['non_embedding_parameters']:,}",
        **shape,
        "weights": f"{entry['dtype']}, {entry['bytes']:,} bytes, from {entry['trained']}",
        **measures,
    }
    return _CARD.format(
        front_matter="\n".join(front_matter),
        submodel=entry["submodel"],
        model=model,
        step=entry["step"],
        run=entry["run"],
        table="\n".join(f"| {what} | {told} |" for what, told in rows.items()),
        sections=sections,
        loading=loading,
    )


def measured(value: float | None, words: str) -> str:
    """`value` in a format such as "{:.4f} nats"; None where nothing measured it."""
    return "not measured" if value is None else words.format(value)


def padded_note(entry: Mapping[str, Any], exact: str) -> str:
    """What a reader must know of widths that were padded; `exact`: which formats do not."""
    return (
        "\nThe architecture has one FFN width, so narrower layers are padded to "
        f"{entry['padded_width']} neurons with zeros: the result is exactly the same, memory and "
        f"time are those of the padded width. {exact} the exact widths.\n"
    )


def _width_runs(widths: Sequence[int]) -> str:
    """[256, 256, 512] as "2 x 256, 1 x 512"."""
    return ", ".join(f"{len(list(run))} x {width}" for width, run in groupby(widths))
