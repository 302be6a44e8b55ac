"""Where DeepSpeed's checkpoint files hold one tensor-parallel rank's weights and Adam's moments.

Legend: T tensor-parallel ranks, d data-parallel rank, mp tensor-parallel rank.

| ZeRO | weights, in fp32 where training kept fp32 masters, and moments                     |
|------|------------------------------------------------------------------------------------|
| 0    | `mp_rank_MP_model_states.pt`: the module's (training is fp32 there), the optimizer's |
|      | by their place in its groups                                                       |
| 1, 2 | `[bf16_]zero_pp_rank_D_mp_rank_MP_optim_states.pt`: flat fp32 groups, cut over d at |
|      | any element; a map names the fragments                                              |
| 3    | the same files: every weight cut over d, padded; `zero_pp_rank_0_mp_rank_MP_model_  |
|      | states.pt` has their order                                                          |

DeepSpeed's own `zero_to_fp32` knows no tensor parallelism, refuses bf16 checkpoints of stage 1
(its BF16_Optimizer leaves out the stage), and unpickles anything. Here torch's restricted
unpickler maps files into memory: no code runs, and what is not asked for is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from matformer_dist.checkpoints.pickles import Ignored, read_pickle
from matformer_dist.errors import UserError
from matformer_dist.run_directory import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("fp32", *MOMENTS)  # of every weight, by DeepSpeed's names

# Flat pieces that make up one weight of one tensor-parallel rank, in order. The last may be
# followed by padding.
Pieces = dict[str, list[Tensor]]


_NO_MATRICES = ("embedding.positions",)  # of an image: vectors that are added, row by row


class RankStates(NamedTuple):
    """What one tensor-parallel rank holds; `step` counts the optimizer's steps."""

    pieces: dict[str, Pieces]  # by state
    step: int


def optimizer_order(weights: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names in the order of the optimizer's two groups: matrices, which decay, and the others."""
    matrices = [n for n, weight in weights.items() if weight.dim() > 1 and n not in _NO_MATRICES]
    return matrices, [name for name in weights if name not in set(matrices)]


@dataclass
class _Fragment:
    """Stands in for DeepSpeed's class of that content: a weight's part of a flat group."""

    numel: int = 0
    start: int = 0


_STAND_INS: list[tuple[type, str]] = [
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Ignored, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def rank_states(directory: Path, rank: int, layout: Layout, precision: str) -> RankStates:
    """Pieces of every weight of tensor-parallel `rank`; UserError where files do not hold them.

    They are views of files mapped into memory: reading happens when they are used.
    """
    try:
        if layout.zero_stage == 0:
            return _whole(_load(directory / f"mp_rank_{rank:02d}_model_states.pt"))
        prefix = "bf16_" if precision == "bf16" else ""
        files = [
            _load(directory / f"{prefix}zero_pp_rank_{d}_mp_rank_{rank:02d}_optim_states.pt")
            for d in range(layout.data)
        ]
        optimizers = [file["optimizer_state_dict"] for file in files]
        if layout.zero_stage < 3:
            return _fragments(optimizers)
        model = _load(directory / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt")
        return _cut_weights(optimizers, model["param_shapes"])
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the checkpoint {directory} is not laid out as DeepSpeed 0.19 does for ZeRO stage "
            f"{layout.zero_stage} ({type(error).__name__}: {error}); read it with the version of "
            "matformer_dist that saved it"
        ) from None


def _load(path: Path) -> Any:
    return read_pickle(path, _STAND_INS)


def _whole(file: Mapping[str, Any]) -> RankStates:
    """Stage 0: weights and moments as they are."""
    module, states = file["module"], file["optimizer"]["state"]
    pieces = {"fp32": {name: [weight.flatten()] for name, weight in module.items()}}
    order = [name for group in optimizer_order(module) for name in group]
    for key in MOMENTS:
        pieces[key] = {order[i]: [state[key].flatten()] for i, state in states.items()}
    return RankStates(pieces, _step(states))


def _fragments(optimizers: list[Mapping[str, Any]]) -> RankStates:
    """Stages 1 and 2: a weight's fragments lie on neighbouring data-parallel ranks."""
    pieces: dict[str, Pieces] = {key: {} for key in STATES}
    for optimizer in optimizers:
        groups = optimizer["single_partition_of_fp32_groups"]
        states = optimizer["base_optimizer_state"]["state"]
        for group, mapping in enumerate(optimizer["param_slice_mappings"]):
            flat = {"fp32": groups[group], **{key: states[group][key] for key in MOMENTS}}
            for name, part in mapping.items():
                for key in STATES:
                    piece = flat[key][part.start : part.start + part.numel]
                    pieces[key].setdefault(name, []).append(piece)
    return RankStates(pieces, _step(optimizers[0]["base_optimizer_state"]["state"]))


def _cut_weights(
    optimizers: list[Mapping[str, Any]], shapes: list[Mapping[str, Any]]
) -> RankStates:
    """Stage 3: every data-parallel rank holds an equal part of each weight, the last padded."""
    pieces: dict[str, Pieces] = {key: {} for key in STATES}
    for group, weights in enumerate(shapes):
        flats: list[dict[str, Tensor]] = [
            {
                "fp32": optimizer["fp32_flat_groups"][group],
                **{key: optimizer["optimizer_state_dict"]["state"][group][key] for key in MOMENTS},
            }
            for optimizer in optimizers
        ]
        start = 0
        for name, shape in weights.items():
            size = -(-prod(shape) // len(optimizers))
            for key in STATES:
                pieces[key][name] = [flat[key][start : start + size] for flat in flats]
            start += size
    return RankStates(pieces, _step(optimizers[0]["optimizer_state_dict"]["state"]))


def _step(states: Mapping[int, Mapping[str, Any]]) -> int:
    """The optimizer's steps, of which all weights have made as many."""
    return int(next(iter(states.values()))["step"]) if states else 0
