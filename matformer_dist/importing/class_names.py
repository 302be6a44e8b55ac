"""Names of classes as checkpoints have them: all different, or numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from matformer_dist.data.images.classes import ClassNames
from matformer_dist.errors import UserError
from matformer_dist.importing.checkpoint_config import short


def class_names(given: Any, count: int, source: str) -> tuple[ClassNames, list[str]]:
    """Of `count` classes, and what the user should know of them.

    given: a list, or a dictionary by number (as text or not), or None. Without a name, or with
    transformers' LABEL_n, a class is called by its number. Names that stand twice, such as
    ImageNet's two cranes, get theirs behind. UserError for fewer than two classes.
    """
    found = _by_number(given, source)
    notices = []
    if found and max(found) >= count:
        notices.append(
            f"{source} names classes up to number {max(found)}, the head's are 0 to {count - 1}: "
            "classes.json numbers them; import with --classes to name them"
        )
        found = {}
    elif not any(name != f"LABEL_{i}" for i, name in found.items()):
        notices.append(
            f"{source} names no classes: classes.json numbers them; import with --classes to name "
            "them"
        )
    names = [found.get(i, "") for i in range(count)]
    names = [str(i) if name in ("", f"LABEL_{i}") else name for i, name in enumerate(names)]
    again = [name for name, times in Counter(names).items() if times > 1]
    if again:
        notices.append(
            f"{source} names classes alike ({', '.join(again[:3])}{', ...' * (len(again) > 3)}): "
            "classes.json has their numbers behind them"
        )
        names = [f"{name} ({i})" if name in again else name for i, name in enumerate(names)]
    return ClassNames(tuple(names), source), notices


def _by_number(given: Any, source: str) -> dict[int, str]:
    try:
        pairs = enumerate(given) if isinstance(given, list) else dict(given or {}).items()
        return {int(i): str(name) for i, name in pairs}
    except (ValueError, TypeError):
        raise UserError(
            f"{source} names its classes {short(given)}, which is neither a list of texts nor an "
            "object by number; mend it, or take the names out"
        ) from None
