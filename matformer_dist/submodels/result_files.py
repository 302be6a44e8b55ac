"""What files of results in a run directory share: their numbers, and how they are read.

Without torch: reports and commands read them.
"""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from matformer_dist.errors import UserError


def _finite_or_nan(value: Any) -> Any:
    return nan if value is None else value


# JSON has no NaN: a writer may leave the bare word or null where a number was not finite.
Number = Annotated[float, BeforeValidator(_finite_or_nan)]
Interval: TypeAlias = tuple[Number, Number]


class Entry(BaseModel):
    """A part of such a file, in which nothing may stand that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_Shape = TypeVar("_Shape", bound=BaseModel)


def read_result(path: Path, shape: type[_Shape], remedy: str) -> _Shape | None:
    """None where there is no such file; UserError, ending in `remedy`, where it is broken."""
    try:
        return shape.model_validate(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({_explain(error)}); {remedy}") from None


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
