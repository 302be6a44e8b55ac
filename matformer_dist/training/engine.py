"""DeepSpeed around a MatLM: the derived dictionary, the optimizer, the engine.

This is the only file that imports deepspeed.
"""

from __future__ import annotations

import difflib
import gc
import math
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
import omegaconf
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from pydantic import ValidationError
from torch import Tensor, nn

from matformer_dist.checkpoints.deepspeed_files import optimizer_order
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.checkpoints.universal_files import description
from matformer_dist.checkpoints.writer import CheckpointWriter
from matformer_dist.config import Config, OptimizerConfig, ScheduleConfig
from matformer_dist.errors import LocalError, UserError
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matlm import MatLM
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import DeepSpeedView, Topology
from matformer_dist.planning.layout import reduce_bucket
from matformer_dist.run_directory import Checkpoint
from matformer_dist.training.resharding import load_other_layout
from matformer_dist.training.timing import Clock

# On a CPU DeepSpeed would compile this at every first start; it serves only inference.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

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
# All classes of DeepSpeed's that its checkpoint files hold.
_IN_CHECKPOINTS = (LossScaler, ZeroStageEnum, fragment_address)
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
    zero = config.deepspeed.get("zero_optimization", {})
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["deepspeed.zero_optimization", *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            raise UserError(f"unknown key {key}; DeepSpeed's documentation lists them") from None
        raise UserError(f"{key} is {first['input']!r}: {first['msg']}") from None
    except TypeError:
        raise UserError(
            f"deepspeed.zero_optimization is {zero!r}; it must hold keys, such as stage: 2"
        ) from None
    if config.zero_stage == 0 and config.training.precision == "bf16":
        raise UserError(
            "deepspeed.zero_optimization.stage 0 with training.precision bf16: DeepSpeed has no "
            "fp32 accumulation there; use stage 1, or training.precision=fp32"
        )
    if config.zero_stage == 0 and (zero or {}).get("offload_optimizer"):
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer needs a stage from 1, and stage is 0; "
            "use stage 1"
        )
    for monitor in ("tensorboard", "wandb"):
        section = config.deepspeed.get(monitor)
        if isinstance(section, Mapping) and "enabled" in section:
            raise UserError(
                f"deepspeed.{monitor}.enabled is derived from logging.{monitor}; set that instead"
            )
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


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule's kind.

    cosine falls from the peak towards min_lr; wsd stays at the peak and falls linearly over the
    last `decay_fraction` of the steps; constant stays. min_lr would be reached one step behind
    the last, which would else do nothing where it is 0.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        length = max(1, total_steps - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps) / length)
        return schedule.min_lr + (peak - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    decay = max(1, round(total_steps * schedule.decay_fraction))
    remaining = min(1.0, max(0, total_steps - step) / decay)
    return schedule.min_lr + (peak - schedule.min_lr) * remaining


def build_model(config: Config, vocab_size: int, topology: Topology) -> MatLM:
    """The universal model's local part: on this rank's device, or for ZeRO-3 still on the host,
    from where DeepSpeed takes weight after weight and leaves each rank its part.
    """
    nestings = [config.granularities] * config.model.n_layers
    init = Initializer(config.training.seed)
    tensor = topology.tensor.with_cut_rows() if config.parallel.sequence else topology.tensor
    model = MatLM(config.model, nestings, vocab_size, init, tensor)
    model.activation_checkpointing = config.training.activation_checkpointing
    return model if config.zero_stage == 3 else model.to(topology.device)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms."""
    parameters = dict(model.named_parameters())
    matrices, others = ([parameters[n] for n in names] for names in optimizer_order(parameters))
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _optimizer(
    model: nn.Module, config: OptimizerConfig, stage: int, offload: bool
) -> torch.optim.Optimizer:
    groups = _parameter_groups(model, config.weight_decay)
    arguments: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
    }
    if offload:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **arguments, adamw_mode=True)
    adamw = torch.optim.AdamW if stage else _AdamW
    return adamw(groups, **arguments, fused=True)


class _AdamW(torch.optim.AdamW):
    """AdamW whose steps can be called off, as ZeRO's are where the norm is not finite."""

    is_called_off = False

    def step(self, closure: Any = None) -> Any:
        return None if self.is_called_off else super().step(closure)


class Engine:
    """One optimizer step at a time over a MatLM, with DeepSpeed holding gradients and states."""

    def __init__(
        self, config: Config, model: MatLM, topology: Topology, clock: Clock | None = None
    ) -> None:
        # zero.Init would take the ranks for one, without a word, where nothing was begun before it.
        deepspeed.init_distributed()
        self.config = config
        self.topology = topology
        self.clock = clock or Clock(topology.device)
        self.clock.watch(model.head, "loss")
        self.accumulation = config.training.micro_batches(topology.data_size)
        self._description = description(dict(model.named_parameters()), model.vocab_size)
        self.weights = len(list(model.parameters()))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        dictionary = deepspeed_dictionary(config, topology.data_size, parameters)
        zero = dictionary["zero_optimization"]
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        optimizer = _optimizer(model, config.optimizer, config.zero_stage, offload)
        if config.training.compile:
            model.compile_layers()
        if config.zero_stage == 3:
            self._partition_weights(model, dictionary)
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=DeepSpeedView(), config=dictionary
        )
        gc.collect()  # weights that DeepSpeed has copied live on in cycles
        self.writer = self.deepspeed.checkpoint_engine = CheckpointWriter(
            config.checkpoint.async_save, _IN_CHECKPOINTS
        )
        # Knows nothing of tensor parallelism or rings, and can fail on one rank of many.
        self.deepspeed._copy_recovery_script = lambda save_path: None
        # DeepSpeed steps a plain optimizer without telling the gradient norm, or whether it is
        # finite.
        self._plain = config.zero_stage == 0 and config.training.precision == "fp32"
        self._plain_norm = 0.0

    def _partition_weights(self, model: MatLM, dictionary: dict[str, Any]) -> None:
        """ZeRO-3: weight after weight to the device, where each rank keeps its part.

        The optimizer is made before, while weights still have their shapes. DeepSpeed casts
        weights at the other stages, but not the parts of these.
        """
        if self.config.training.precision == "bf16":
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        deepspeed.zero.Init(
            module=model,
            data_parallel_group=self.topology.data_group,
            config_dict_or_path=dictionary,
            mpu=DeepSpeedView(),
        )
        if model.tied_weight is not None:
            # The head reads the embedding's weight: ZeRO-3 must gather it there too.
            deepspeed.zero.register_external_parameter(model.head, model.tied_weight)

    def train_step(
        self,
        micro_batches: Iterator[tuple[Tensor, Tensor]],
        passes: Iterator[Pass],
        lr: float,
    ) -> list[tuple[Pass, Tensor]]:
        """One optimizer step; returns each micro-batch's Pass and its statistics [n, 4]."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        results = []
        part = self.clock.part
        for _ in range(self.accumulation):
            with part("data"):
                tokens, targets = next(micro_batches)
                plan = next(passes)
            with part("forward"):
                loss, statistics = self.deepspeed(tokens, targets, plan)
            with part("backward"):
                self.deepspeed.backward(loss)
            with part("optimizer"):
                if self._plain and self.deepspeed.is_gradient_accumulation_boundary():
                    self._plain_norm = self._gradient_norm()
                    self.deepspeed.optimizer.is_called_off = not math.isfinite(self._plain_norm)
                self.deepspeed.step()
            results.append((plan, statistics))
        return results

    @property
    def was_skipped(self) -> bool:
        """Whether the last step changed nothing, because its gradient was not finite.

        A loss that is not finite makes a gradient that is not. All ranks agree.
        """
        if self._plain:
            return not math.isfinite(self._plain_norm)
        return not self.deepspeed.was_step_applied()

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's whole gradient, before clipping, over all ranks."""
        return self._plain_norm if self._plain else float(self.deepspeed.get_global_grad_norm())

    def _gradient_norm(self) -> float:
        tensor = self.topology.tensor
        total = torch.zeros((), device=self.topology.device)
        for parameter in self.deepspeed.module.parameters():
            # A replicated weight has the same gradient on every tensor-parallel rank.
            if tensor.rank == 0 or getattr(parameter, "tensor_model_parallel", False):
                total += parameter.grad.float().square().sum()
        if tensor.size > 1:
            dist.all_reduce(total, group=tensor.group)
        return float(total.sqrt())

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor, plan: Pass) -> Tensor:
        """Statistics [n, 4] of one batch, see MatLM.forward."""
        self.deepspeed.eval()
        _, statistics = self.deepspeed(tokens, targets, plan)
        self.deepspeed.train()
        return statistics

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Send (name, value, step) to TensorBoard and W&B, where they are on."""
        if self.deepspeed.monitor.enabled:
            self.deepspeed.monitor.write_events(events)

    def save(self, directory: str, tag: str) -> None:
        self.deepspeed.save_checkpoint(directory, tag, self._description, save_latest=False)

    def load(self, checkpoint: Checkpoint) -> None:
        """Weights and optimizer state of a checkpoint of this layout.

        UserError where a file holds what a checkpoint does not.
        """
        path = checkpoint.path
        try:
            loaded, _ = self.deepspeed.load_checkpoint(str(path.parent), path.name)
        except pickle.UnpicklingError:
            raise LocalError(
                f"the checkpoint {path} holds objects that no checkpoint of ours does, and is not "
                "read; choose one from a place you trust"
            ) from None
        if loaded is None:
            raise LocalError(f"DeepSpeed does not load the checkpoint {path}; choose another")

    def load_other_layout(self, checkpoint: Checkpoint, advance: Callable[[str], None]) -> None:
        """The same of any other layout; `advance` is told the name of every weight done."""
        source = load_universal(checkpoint)
        load_other_layout(self.deepspeed, source, self.topology, advance)
