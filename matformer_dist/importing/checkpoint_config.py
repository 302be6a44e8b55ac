"""config.json of a checkpoint of others: read, and what is wrong with it in its own words.

Only the file is read: no code of transformers or timm runs, so neither need be installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from matformer_dist.errors import UserError

_LONGEST_VALUE = 120  # characters, in a message


def read_config(directory: Path) -> dict[str, Any]:
    """Of `directory`/config.json; UserError where there is none, or it is no JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read {path} ({reason}); give the folder of a Hugging Face checkpoint, with "
            "its config.json"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object; give the folder of a Hugging Face model")
    return config


def refuse(directory: Path, found: Sequence[str]) -> None:
    """UserError that names all that was found, if anything was."""
    if found:
        raise UserError(
            f"{directory / 'config.json'} describes a model that cannot be imported: "
            f"{'; '.join(found)}. Its weights would compute something else here; choose a "
            "checkpoint without that"
        )


def not_allowed(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Keys whose values are none of the allowed ones; the first of these is the default."""
    for key, values in allowed.items():
        value = config.get(key, values[0])
        if value not in values:
            yield f"{key} is {short(value)}, allowed is {values[0]!r}"


def invalid_config(directory: Path, error: ValidationError, keys: Mapping[str, str]) -> UserError:
    """What our settings refused, by the names of their `keys`; ours: theirs."""
    reasons = [_explain(item, keys) for item in error.errors()]
    return UserError(
        f"{directory / 'config.json'} describes a model that cannot be imported: "
        f"{'; '.join(reasons)}"
    )


def _explain(item: Any, keys: Mapping[str, str]) -> str:
    """One finding of pydantic, in the words of config.json."""
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        for ours, theirs in keys.items():
            message = message.replace(f"model.{ours} ", f"{theirs} ")
        return message
    first, *inner = item["loc"]
    name = ".".join(map(str, [keys.get(first, first), *inner]))
    return f"{name} is {item['input']!r}: {item['msg']}"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
