"""Configurations from YAML files and section.key=value overrides; every mistake in words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import omegaconf
import yaml
from pydantic import Discriminator, Tag, ValidationError

from matformer_dist.config import Config
from matformer_dist.config_language import LanguageConfig, LanguageModelConfig
from matformer_dist.config_vision import VisionConfig, VisionModelConfig
from matformer_dist.errors import UserError

_DEFAULT_TASK = "language"
# if_open where data.train, which an imported run leaves open, is not read.
UNREAD_DATA: dict[str, dict[str, Any]] = {
    "language": {"data.train": [[1.0, "unset"]]},
    "vision": {"data.train": "unset"},
}
_TASKS: dict[str, type[Config]] = {"language": LanguageConfig, "vision": VisionConfig}


def _task_of_model(model: Any) -> str:
    if isinstance(model, dict):
        return "vision" if "patch_size" in model else "language"
    return "vision" if isinstance(model, VisionModelConfig) else "language"


# The section `model` of any task, where it stands alone in a file.
AnyModelConfig: TypeAlias = Annotated[
    Annotated[LanguageModelConfig, Tag("language")] | Annotated[VisionModelConfig, Tag("vision")],
    Discriminator(_task_of_model),
]


def load_config(
    path: str | Path,
    overrides: Sequence[str] | None = None,
    if_open: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, validate; UserError on any mistake.

    overrides: None where the user has no place to give any. if_open: by task, values of keys that
    the file may leave open (???).
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the config file {path} is not text; it must be YAML") from None
    try:
        loaded = omegaconf.OmegaConf.create(text)
        _check_sections(loaded, path)
        merged = omegaconf.OmegaConf.merge(loaded, _parse_overrides(overrides or ()))
        task = str(omegaconf.OmegaConf.select(merged, "task", default=_DEFAULT_TASK))
        given = (if_open or {}).get(task, {})
        for key in sorted(omegaconf.OmegaConf.missing_keys(merged)):
            if key in given:
                omegaconf.OmegaConf.update(merged, key, given[key])
                continue
            remedy = "write a value there"
            if overrides is not None:
                remedy += f", or give it as an override, {key}=..."
            raise UserError(f"the config file {path} leaves {key} open (???); {remedy}")
        tree = omegaconf.OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except UserError:  # a ValueError, but said already
        raise
    except yaml.YAMLError as error:
        raise UserError(f"the config file {path} is not valid YAML: {error}") from None
    except omegaconf.errors.OmegaConfBaseException as error:
        raise UserError(f"the config file {path}: {error}".split("\n")[0]) from None
    except (TypeError, ValueError) as error:  # OmegaConf, where a list is given a dictionary's keys
        raise UserError(
            f"overrides {list(overrides or ())} do not fit the config file {path} ({error}); a "
            "list is overridden whole, as in data.train=[[1,corpus]]"
        ) from None
    return validate_config(tree, source=str(path))


def _check_sections(loaded: Any, path: str | Path) -> None:
    if not isinstance(loaded, omegaconf.DictConfig) or not loaded:
        raise UserError(
            f"the config file {path} must hold sections ({', '.join(Config.model_fields)}), each "
            "with its keys"
        )
    for key in loaded:
        if key == "task":
            continue
        if not isinstance(loaded._get_node(key), omegaconf.DictConfig) or loaded[key] is None:
            raise UserError(
                f"the config file {path}: the section {key!s} is {loaded[key]!r}, but must hold "
                "keys; write some below it, or take it out"
            )


def _parse_overrides(overrides: Sequence[str]) -> omegaconf.DictConfig:
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or "." not in key:
            raise UserError(
                f"override {item!r} must be written section.key=value, for example "
                "training.steps=100"
            )
    try:
        parsed = omegaconf.OmegaConf.from_dotlist(list(overrides))
        for key in omegaconf.OmegaConf.missing_keys(parsed):  # merging would pass over them
            raise UserError(f"override {key}=??? sets no value; write one behind the =")
        return parsed
    except (omegaconf.errors.OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"overrides {list(overrides)}: {error}".split("\n")[0]) from None


def validate_config(tree: Any, source: str) -> Config:
    """Build a Config from plain dictionaries; every mistake becomes a line of one UserError."""
    task = tree.get("task", _DEFAULT_TASK)
    if not isinstance(task, str) or task not in _TASKS:
        raise UserError(f"{source}: task is {task!r}; it must be one of {', '.join(_TASKS)}")
    of_task = _TASKS[task]
    try:
        return of_task.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, of_task) for item in error.errors()]
        raise UserError("\n".join([f"{source}: {lines[0]}", *lines[1:]])) from None


def _explain(item: Any, of_task: type[Config]) -> str:
    """One line for one finding of pydantic, in the words of the config file."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _keys_of(location[:-1], of_task)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else ""
        return f"unknown key {key}; {hint or 'known here: ' + ', '.join(known)}"
    if item["type"] == "missing":
        return f"{key} is not set, and has no default"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{key} is {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _keys_of(location: Sequence[str], of_task: type[Config]) -> list[str]:
    section: Any = of_task
    for part in location:
        section = section.model_fields[part].annotation
    return [*getattr(section, "expanded_keys", ()), *section.model_fields]
