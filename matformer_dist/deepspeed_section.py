"""The section `deepspeed` of a configuration: what is allowed there, and what DeepSpeed is given.

deepspeed itself is imported where it is asked, which takes seconds: `matformer plan` looks at the
common sections without.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Any

import omegaconf
from pydantic import ValidationError

from matformer_dist.config import Config
from matformer_dist.errors import UserError
from matformer_dist.planning.layout import reduce_bucket

_DERIVED_ELSEWHERE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "bf16": "training.precision",
    "checkpoint": "the section checkpoint",
    "fp16": "training.precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}
# DeepSpeed takes a key that it does not know without a word.
_PASSED_ON = (
    "aio", "comet", "comms_logger", "communication_data_type", "csv_monitor",
    "data_types", "flops_profiler", "gradient_predivide_factor", "memory_breakdown",
    "prescale_gradients", "seq_parallel_communication_data_type", "steps_per_print", "tensorboard",
    "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


def check_deepspeed_section(config: Config, data_size: int) -> None:
    """UserError for a key or value of the `deepspeed` section that DeepSpeed would not take."""
    for key in config.deepspeed:
        if key in _DERIVED_ELSEWHERE:
            ours = _DERIVED_ELSEWHERE[key]
            raise UserError(f"deepspeed.{key} is derived from {ours}; set that instead")
        if key not in _PASSED_ON:
            close = difflib.get_close_matches(key, _PASSED_ON, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_PASSED_ON)}"
            raise UserError(f"unknown key deepspeed.{key}; {hint}")
    if config.zero_stage == 0 and config.training.precision == "bf16":
        raise UserError(
            "deepspeed.zero_optimization.stage 0 with training.precision bf16: DeepSpeed has no "
            "fp32 accumulation there; use stage 1, or training.precision=fp32"
        )
    zero = config.zero_optimization
    if config.zero_stage == 0 and zero.get("offload_optimizer"):
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer needs a stage from 1, and stage is 0; "
            "use stage 1"
        )
    if config.zero_stage < 3 and zero.get("offload_param"):
        raise UserError(
            f"deepspeed.zero_optimization.offload_param needs stage 3, and stage is "
            f"{config.zero_stage}; use stage 3, or take offload_param out"
        )
    if filled_in := [key for key, value in zero.items() if value == "auto"]:
        raise UserError(
            f"deepspeed.zero_optimization.{filled_in[0]} is 'auto', which nothing fills in here; "
            "write a value, or leave the key out"
        )
    if zero.get("reduce_bucket_size") == 0:
        raise UserError(
            "deepspeed.zero_optimization.reduce_bucket_size is 0; it must be 1 element or more, or "
            "be left out: then it fits the model"
        )
    for monitor in ("tensorboard", "wandb"):
        section = config.deepspeed.get(monitor)
        if isinstance(section, Mapping) and "enabled" in section:
            raise UserError(
                f"deepspeed.{monitor}.enabled is derived from logging.{monitor}; set that instead"
            )
    if config.deepspeed.keys() - {"zero_optimization"} or zero.keys() - {"stage"}:
        _check_by_deepspeed(config, data_size)


def _check_by_deepspeed(config: Config, data_size: int) -> None:
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**config.zero_optimization)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["deepspeed.zero_optimization", *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            raise UserError(f"unknown key {key}; DeepSpeed's documentation lists them") from None
        raise UserError(f"{key} is {first['input']!r}: {first['msg']}") from None
    try:
        dictionary = deepspeed_dictionary(config, data_size)
        for key in ("train_batch_size", "gradient_accumulation_steps"):
            del dictionary[key]  # checked by ourselves; DeepSpeed does not know its ranks yet
        deepspeed.DeepSpeedConfig(dictionary)
    except (ValidationError, DeepSpeedConfigError, AssertionError, AttributeError, TypeError,
            ValueError, KeyError) as error:  # fmt: skip
        raise UserError(
            f"DeepSpeed does not take the section deepspeed {config.deepspeed}: "
            f"{' '.join(str(error).split())[:300]}; see its documentation of that key"
        ) from None


def deepspeed_dictionary(
    config: Config, data_size: int, parameters: int = sys.maxsize
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours; the `deepspeed` section is merged over it.

    parameters: elements of one rank's weights.
    """
    logs = {"output_path": str(config.run.dir / "tensorboard"), "job_name": "train"}
    derived = {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.training.micro_batches(data_size),
        "gradient_clipping": config.optimizer.grad_clip,
        # The buffer that gradients are sent from is allocated whole, however few there are.
        "zero_optimization": {"stage": 1, "reduce_bucket_size": reduce_bucket(parameters)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        # Gradients go into the fp32 sum, and away, as they come. That sum over micro-batches would
        # lose a bit a doubling in bf16.
        "bf16": {"enabled": config.training.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "tensorboard": {"enabled": config.logging.tensorboard, **logs},
        "wandb": {
            "enabled": config.logging.wandb,
            "project": config.logging.wandb_project,
        },
    }
    merged = omegaconf.OmegaConf.merge(derived, config.deepspeed)
    result = omegaconf.OmegaConf.to_container(merged, resolve=True)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def zero_options(config: Config) -> dict[str, Any]:
    """What else of DeepSpeed's section may change how it lays a weight into its files."""
    return {key: value for key, value in config.zero_optimization.items() if key != "stage"}
