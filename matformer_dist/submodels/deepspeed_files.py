"""Where DeepSpeed's checkpoint files hold one tensor-parallel rank's weights.

Legend: T tensor-parallel ranks, d data-parallel rank, mp tensor-parallel rank.

| ZeRO | weights, in fp32 where training kept fp32 masters                                  |
|------|------------------------------------------------------------------------------------|
| 0    | `mp_rank_MP_model_states.pt`: the module's (training is fp32 there)                 |
| 1, 2 | `[bf16_]zero_pp_rank_D_mp_rank_MP_optim_states.pt`: flat fp32 groups, cut over d at |
|      | any element; a map names the fragments                                              |
| 3    | the same files: every weight cut over d, padded; `zero_pp_rank_0_mp_rank_MP_model_  |
|      | states.pt` has their order                                                          |

DeepSpeed's own `zero_to_fp32` knows no tensor parallelism, refuses bf16 checkpoints of stage 1
(its BF16_Optimizer leaves out the stage), and unpickles anything. Here torch's restricted
unpickler maps files into memory: no code runs, and what is not asked for is not read.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matformer_dist.errors import UserError

# Flat pieces that make up one weight of one tensor-parallel rank, in order. The last may be
# followed by padding.
Pieces = dict[str, list[Tensor]]


@dataclass
class _Fragment:
    """Stands in for DeepSpeed's class of that content: a weight's part of a flat group."""

    numel: int = 0
    start: int = 0


class _Ignored:
    """Stands in for DeepSpeed's classes that say nothing about weights."""

    def __init__(self, *values: object) -> None:
        pass


_STAND_INS: list[Any] = [
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def rank_pieces(
    directory: Path, rank: int, *, zero_stage: int, data_ranks: int, precision: str
) -> Pieces:
    """Pieces of every weight of tensor-parallel `rank`; UserError where files do not hold them.

    They are views of files mapped into memory: reading happens when they are used.
    """
    try:
        if zero_stage == 0:
            module = _load(directory / f"mp_rank_{rank:02d}_model_states.pt")["module"]
            return {name: [weight.flatten()] for name, weight in module.items()}
        prefix = "bf16_" if precision == "bf16" else ""
        states = [
            _load(directory / f"{prefix}zero_pp_rank_{d}_mp_rank_{rank:02d}_optim_states.pt")
            for d in range(data_ranks)
        ]
        optimizers = [state["optimizer_state_dict"] for state in states]
        if zero_stage < 3:
            return _fragments(optimizers)
        model = _load(directory / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt")
        return _cut_weights(optimizers, model["param_shapes"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"the checkpoint {directory} is not laid out as DeepSpeed 0.19 does for ZeRO stage "
            f"{zero_stage} ({type(error).__name__}: {error}); extract it with the version of "
            "matformer_dist that saved it"
        ) from None


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"the checkpoint is incomplete: {path} is missing; choose another"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the checkpoint is damaged: cannot read {path} ({str(error).splitlines()[0]}); "
            "choose another"
        ) from None


def _fragments(optimizers: list[Mapping[str, Any]]) -> Pieces:
    """Stages 1 and 2: a weight's fragments lie on neighbouring data-parallel ranks."""
    pieces: Pieces = {}
    for optimizer in optimizers:
        groups = optimizer["single_partition_of_fp32_groups"]
        for flat, mapping in zip(groups, optimizer["param_slice_mappings"], strict=True):
            for name, part in mapping.items():
                pieces.setdefault(name, []).append(flat[part.start : part.start + part.numel])
    return pieces


def _cut_weights(optimizers: list[Mapping[str, Any]], shapes: list[Mapping[str, Any]]) -> Pieces:
    """Stage 3: every data-parallel rank holds an equal part of each weight, the last padded."""
    pieces: Pieces = {}
    for group, weights in enumerate(shapes):
        start = 0
        for name, shape in weights.items():
            size = -(-prod(shape) // len(optimizers))
            pieces[name] = [
                optimizer["fp32_flat_groups"][group][start : start + size]
                for optimizer in optimizers
            ]
            start += size
    return pieces
