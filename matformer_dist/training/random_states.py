"""The states of this process' random generators, as text.

Data and objectives draw from the seed and the step, so a run of ours needs none of these; code that
a user adds may.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any, cast

import numpy as np
import torch


def capture() -> dict[str, str]:
    """Of Python, NumPy and torch, on the CPU and on this rank's GPU."""
    kind, key, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states = {
        "python": _packed(json.dumps(random.getstate()).encode()),
        "numpy": _packed(json.dumps([kind, key.tolist(), *rest]).encode()),
        "torch": _packed(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _packed(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def restore(states: dict[str, str]) -> None:
    """Go on from what `capture` returned; kinds that are not there, or not here, stay."""
    if "python" in states:
        version, internal, gauss = json.loads(_unpacked(states["python"]))
        random.setstate((version, tuple(internal), gauss))
    if "numpy" in states:
        kind, key, *rest = json.loads(_unpacked(states["numpy"]))
        np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    if "torch" in states:
        torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unpacked(text: str) -> bytes:
    return base64.b64decode(text)


def _bytes(text: str) -> Any:
    return torch.frombuffer(bytearray(_unpacked(text)), dtype=torch.uint8)
