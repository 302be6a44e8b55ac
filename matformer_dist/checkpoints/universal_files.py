"""DeepSpeed's universal checkpoints: `zero/WEIGHT/STATE.pt`, every weight whole.

DeepSpeed's loader cuts them for any tensor-parallel degree by what stands beside the values: a
nested FFN's rings are its sub-parameters, a vocabulary's padding is left out. Values are in
canonical order, so a submodel's weights are prefixes of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matformer_dist.checkpoints.pickles import Ignored, read_pickle
from matformer_dist.errors import UserError
from matformer_dist.parallel.layout import REPLICATED, Partition

VOCABULARY = ("embedding.weight", "head.weight", "head.bias")  # cut by rows, and padded
_VALUE = "param"


_STAND_INS: list[tuple[type, str]] = [
    (Ignored, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
]


def description(parameters: Mapping[str, nn.Parameter], outputs: int) -> dict[str, Any]:
    """What DeepSpeed's converter asks of a checkpoint: how each weight of a rank is cut.

    It is told by patterns, of which ours are whole names. A weight in blocks
    has sub-parameters, which are dealt one after the other.
    """
    info: dict[str, Any] = {
        "universal_checkpoint_version": 0.3,
        "original_vocab_size": outputs,
        "vocabulary_parameter_patterns": [],
        "tp_replicated_parameter_patterns": [],
        "parameter_with_row_parallelism_patterns": [],
        "parameter_with_sub_params": [],
    }
    for name, parameter in parameters.items():
        partition: Partition = getattr(parameter, "partition", REPLICATED)
        pattern = f"{re.escape(name)}$"
        if partition.dim is None:
            info["tp_replicated_parameter_patterns"].append(pattern)
        elif partition.blocks is not None:
            shape: list[Any] = list(parameter.shape)
            shape[partition.dim] = partition.blocks
            info["parameter_with_sub_params"].append(
                {"patterns": [pattern], "shape": tuple(shape), "partition_dim": partition.dim}
            )
        elif partition.dim == 1:
            info["parameter_with_row_parallelism_patterns"].append(pattern)
        elif name in VOCABULARY:
            info["vocabulary_parameter_patterns"].append(pattern)
    return {"universal_checkpoint_info": info}


def stored_value(name: str, parameter: nn.Parameter, value: Tensor) -> dict[str, Any]:
    """What stands in the file of a weight's state: the value, and how it is cut."""
    from deepspeed.checkpoint.universal_checkpoint import SubparamShape

    partition: Partition = getattr(parameter, "partition", REPLICATED)
    # A copy: a view of a file's memory would take all of that along.
    content: dict[str, Any] = {_VALUE: value.clone(memory_format=torch.contiguous_format)}
    if partition.blocks is not None and partition.dim is not None:
        shape: list[Any] = list(parameter.shape)
        shape[partition.dim] = partition.blocks
        content["sub_param_shape"] = SubparamShape(
            patterns=[f"{re.escape(name)}$"], shape=tuple(shape), partition_dim=partition.dim
        )
    elif partition.dim is not None:
        content["cat_dim"] = partition.dim
        if name in VOCABULARY:
            content["vocab_tensor"] = True
    return content


def value_path(directory: Path, name: str, state: str) -> Path:
    return directory / "zero" / name / f"{state}.pt"


def read_value(directory: Path, name: str, state: str, shape: torch.Size) -> Tensor:
    """One state of a weight, mapped into memory; UserError where the file does not hold it."""
    path = value_path(directory, name, state)
    content = read_pickle(path, _STAND_INS)
    value = content.get(_VALUE) if isinstance(content, dict) else None
    if not isinstance(value, Tensor):
        raise UserError(f"the checkpoint is damaged: {path} holds no weight; choose another")
    if value.numel() != shape.numel():
        raise UserError(
            f"{path} holds {list(value.shape)}, the model's {name} is {list(shape)}; choose another"
        )
    return value.view(shape)
