"""DeepSpeed around a MatFormer: the optimizer, the engine.

The only file that imports deepspeed, but for the check of its settings (deepspeed_section.py).
"""

from __future__ import annotations

import gc
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from matformer_dist.checkpoints.deepspeed_files import optimizer_order
from matformer_dist.checkpoints.universal import load_universal
from matformer_dist.checkpoints.universal_files import description
from matformer_dist.checkpoints.writer import CheckpointWriter
from matformer_dist.config import Config, OptimizerConfig, ScheduleConfig
from matformer_dist.deepspeed_section import deepspeed_dictionary
from matformer_dist.errors import LocalError
from matformer_dist.models import building
from matformer_dist.models.forward_pass import Pass
from matformer_dist.models.matformer import MatFormer
from matformer_dist.parallel.layers import Initializer
from matformer_dist.parallel.topology import DeepSpeedView, Topology
from matformer_dist.run_directory import Checkpoint
from matformer_dist.training.resharding import Shares, load_other_layout
from matformer_dist.training.timing import Clock

# On a CPU DeepSpeed would compile this at every first start; it serves only inference.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# All classes of DeepSpeed's that its checkpoint files hold.
_IN_CHECKPOINTS = (LossScaler, ZeroStageEnum, fragment_address)


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


def build_model(config: Config, outputs: int, topology: Topology) -> MatFormer:
    """The universal model's local part: on this rank's device, or for ZeRO-3 still on the host,
    from where DeepSpeed takes weight after weight and leaves each rank its part.
    """
    nestings = [config.granularities] * config.model.n_layers
    init = Initializer(config.training.seed)
    tensor = topology.tensor.with_cut_rows() if config.parallel.sequence else topology.tensor
    model = building.build_model(config.model, nestings, outputs, init, tensor)
    model.activation_checkpointing = config.training.activation_checkpointing
    return model if config.zero_stage == 3 else model.to(topology.device)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms, biases and positions."""
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
    """One optimizer step at a time over a MatFormer; DeepSpeed holds gradients and states."""

    def __init__(
        self, config: Config, model: MatFormer, topology: Topology, clock: Clock | None = None
    ) -> None:
        # zero.Init would take the ranks for one, without a word, where nothing was begun before it.
        deepspeed.init_distributed()
        self.config = config
        self.topology = topology
        self.clock = clock or Clock(topology.device)
        self.clock.watch(model.head, "loss")
        self.accumulation = config.training.micro_batches(topology.data_size)
        self._description = description(dict(model.named_parameters()), model.outputs)
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

    def _partition_weights(self, model: MatFormer, dictionary: dict[str, Any]) -> None:
        """ZeRO-3: weight after weight to the device, where each rank keeps its part.

        The optimizer is made before, while weights still have their shapes. DeepSpeed casts
        weights at the other stages, but not the parts of these.
        """
        if self.config.training.precision == "bf16":
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        for buffer in model.buffers():  # zero.Init moves weights alone
            buffer.data = buffer.data.to(self.topology.device)
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
        """One optimizer step; returns each micro-batch's Pass and its statistics [B, 5]."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        results = []
        part = self.clock.part
        for _ in range(self.accumulation):
            with part("data"):
                inputs, targets = next(micro_batches)
                plan = next(passes)
            with part("forward"):
                loss, statistics = self.deepspeed(inputs, targets, plan)
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
    def evaluate(self, inputs: Tensor, targets: Tensor, plan: Pass) -> Tensor:
        """Statistics [B, 5] of one batch, see MatFormer.forward."""
        self.deepspeed.eval()
        _, statistics = self.deepspeed(inputs, targets, plan)
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
        self.begin_from(load_universal(checkpoint), advance)

    def begin_from(self, source: Shares, advance: Callable[[str], None]) -> None:
        """Weights, and moments if there are any, from wherever."""
        load_other_layout(self.deepspeed, source, self.topology, advance)
