"""lm-eval's tasks by name, with all their data, before a model runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub import constants
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from matformer_dist.errors import UserError

TASKS = Path(__file__).with_name("tasks")
_GROUP_KEYS = set(GroupConfig.__dataclass_fields__)
_PROBE_SECONDS = 5


@dataclass(frozen=True)
class LoadedTasks:
    tasks: dict[str, Task]
    groups: dict[str, Group]  # whole ones alone
    missing: dict[str, str] = field(default_factory=dict)  # task: why its data are not here


@dataclass(frozen=True)
class _Leaf:
    """A task as a group has it: what lm-eval's loader is to be given for it alone."""

    name: str
    spec: str | dict[str, Any]


def load_tasks(
    names: Sequence[str],
    *,
    include: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    skip_missing: bool = False,
) -> LoadedTasks:
    """Tasks, groups, tags or patterns of these names: ours, lm-eval's, and those under `include`.

    UserError for a name that is unknown, and one for all tasks whose data cannot be had, unless
    they are to be skipped. Without a network that takes seconds, not a retry a task.
    """
    if include and not include.is_dir():
        raise UserError(f"there is no folder {include}; give one that holds lm-eval's task files")
    manager, names = _find(names, include, dict(metadata or {}))
    leaves = [leaf for name in names for leaf in _leaves(manager, name, {})]
    needs_hub = any(_needs_hub(manager, leaf.name) for leaf in leaves)
    with _offline_unless_reachable(needs_hub) as reachable:
        try:
            loaded = manager.load(list(names))
            return LoadedTasks(loaded["tasks"], loaded.get("groups", {}))
        except Exception as error:  # of any kind: each task has a loader of its own
            whole = error
        found: dict[str, Task] = {}
        missing: dict[str, str] = {}
        for leaf in leaves:
            try:
                found.update(manager.load([leaf.spec])["tasks"])
            except Exception as error:
                missing[leaf.name] = _reason(manager, leaf.name, error, reachable)
    if not missing:
        raise UserError(f"lm-eval cannot load {', '.join(names)} together: {whole}")
    if not found or not skip_missing:
        raise _explain(manager, missing, reachable, bool(found))
    return LoadedTasks(found, {}, missing)


def _find(
    names: Sequence[str], include: Path | None, metadata: dict[str, Any]
) -> tuple[TaskManager, list[str]]:
    """The index that knows them all, and the names that patterns stand for.

    lm-eval's own index takes seconds to read: not for our tasks.
    """
    paths = [str(path) for path in (TASKS, include) if path]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if not all(_is_known(manager, name) for name in names):
        manager = TaskManager(include_path=paths, metadata=metadata)
    chosen: dict[str, None] = {}
    for name in names:
        matching = [known for known in manager.all_tasks if fnmatch(known, name)]
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise UserError(
                f"there is no task {name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
                + "; give names of lm-eval's tasks, or --include-path for files of your own"
            )
        chosen.update(dict.fromkeys(matching))
    return manager, list(chosen)


def _is_known(manager: TaskManager, name: str) -> bool:
    """Whether the index holds it, and all that it stands for."""
    entry = manager.task_index.get(name)
    if entry is None or (entry.cfg or {}).get("class"):
        return False
    return all(leaf.name in manager.task_index for leaf in _leaves(manager, name, {}))


def _leaves(manager: TaskManager, name: str, inherited: Mapping[str, Any]) -> Iterator[_Leaf]:
    """The tasks of a name; settings of a group hold for its tasks, and those of outer ones more."""
    entry = manager.task_index.get(name)
    config = entry.cfg or {} if entry else {}
    members = config.get("task")
    if entry and entry.tags and not config:  # a tag
        members = sorted(entry.tags)
    if not isinstance(members, list):
        settings = {key: value for key, value in inherited.items() if key != "task"}
        spec = {"group": "alone", "task": [{**settings, "task": name}]} if settings else name
        yield _Leaf(name, spec)
        return
    if entry and entry.yaml_path:
        config = _read(entry.yaml_path)
        members = config["task"]
    own = {key: value for key, value in config.items() if key not in _GROUP_KEYS}
    for member in members:
        item = {"task": member} if isinstance(member, str) else dict(member)
        inner = str(item.pop("task", None) or item.pop("group"))
        yield from _leaves(manager, inner, {**own, **inherited, **item})


def _read(path: Path) -> dict[str, Any]:
    """A group's file with the functions that it names, which the index has as texts."""
    try:
        return dict(load_yaml(path))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path} names a function that there is not: {error}") from None


def _needs_hub(manager: TaskManager, name: str) -> bool:
    entry = manager.task_index.get(name)
    return not (entry and entry.cfg and entry.cfg.get("custom_dataset"))


@contextmanager
def _offline_unless_reachable(needed: bool) -> Iterator[bool]:
    """Where the hub does not answer, the cache alone is looked at: else each of its files would be
    asked for six times, with pauses. Yields whether it answers, or was told not to be asked.
    """
    was = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    reachable = True
    if needed and not any(was):
        try:
            huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        except Exception:  # of whichever library for HTTP it has
            reachable = False
    try:
        if not reachable:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was


def _reason(manager: TaskManager, name: str, error: Exception, reachable: bool) -> str:
    """Why it has no data; the name of the dataset alone where nothing could be fetched."""
    if isinstance(error, UserError):
        return str(error)
    entry = manager.task_index.get(name)
    path = (entry.cfg or {}).get("dataset_path") if entry else None
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if path and not reachable and isinstance(error, ConnectionError):
        return str(path)
    return f"{path}: {first}" if path and path not in first else first


def _explain(
    manager: TaskManager, missing: Mapping[str, str], reachable: bool, others: bool
) -> UserError:
    listed = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
    said = f"the data of these tasks cannot be had: {listed}"
    if not reachable:
        said = f"{constants.ENDPOINT} does not answer, and {said}"
    if any(_needs_hub(manager, name) for name in missing):
        said += (
            "; run once where there is a network, which fills the cache "
            f"{datasets.config.HF_DATASETS_CACHE}"
        )
    return UserError(said + ("; or leave these tasks out by --skip-missing" if others else ""))
