"""timm for tests, also where torchvision's compiled operators do not belong to the torch here.

`make env` puts both into a folder of their own, .venv/timm, since a torchvision that does not
import would break transformers. Of torchvision's wheels some do not fit a CPU build of torch: then
its import ends with "operator torchvision::nms does not exist". Images and ViTs need no operator
of it, so those that the import asks for are declared, without an implementation.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(sys.prefix) / "timm"
_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library


def import_timm() -> Any:
    """timm; the module that asks is skipped where it is not installed."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # behind what else is installed
    for library in ("torchvision", "timm"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed", allow_module_level=True)
    mend_torchvision()
    return importlib.import_module("timm")


def mend_torchvision() -> None:
    """Make torchvision importable, where it is installed; transformers imports it too."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
