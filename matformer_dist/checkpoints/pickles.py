"""Reading files of torch.save by torch's restricted unpickler: no code of theirs runs."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from matformer_dist.errors import UserError


class Ignored:
    """Stands in for a class of which nothing is needed."""

    def __init__(self, *values: object) -> None:
        pass


def read_pickle(path: Path, stand_ins: Sequence[tuple[type, str]]) -> Any:
    """The content of `path`, tensors as views of the file mapped into memory.

    stand_ins: classes of ours, by the full names of those in the file that they stand in for; all
    others but torch's are refused. UserError where the file is missing or damaged.
    """
    try:
        with torch.serialization.safe_globals(list(stand_ins)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"the checkpoint is incomplete: {path} is missing; choose another"
        ) from None
    except pickle.UnpicklingError:  # whose advice is to let any code run
        reason = "it holds something else than weights and numbers"
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"the checkpoint is damaged: cannot read {path} ({reason}); choose another")
