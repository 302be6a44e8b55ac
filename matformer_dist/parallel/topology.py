"""Process groups: who shares a model (tensor parallel) and who shares a step (data parallel).

Megatron-Core owns the groups; DeepSpeed is shown them through `DeepSpeedView`. This file and
launch/ are the only places that read environment variables.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from matformer_dist.errors import UserError


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that hold one copy of the model together; `group` is None for a single one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, statistics: torch.Tensor) -> torch.Tensor:
        """All ranks' values of a small tensor [n, k] as [T, n, k], by one all-gather."""
        if self.size == 1:
            return statistics.unsqueeze(0)
        out = statistics.new_empty((self.size * statistics.shape[0], *statistics.shape[1:]))
        dist.all_gather_into_tensor(out, statistics.contiguous(), group=self.group)
        return out.view(self.size, *statistics.shape)


SINGLE = TensorParallel()


@dataclass(frozen=True)
class Topology:
    """This process' place in the job."""

    tensor: TensorParallel
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes the run's own files."""
        return dist.get_rank() == 0

    @property
    def world_size(self) -> int:
        return self.tensor.size * self.data_size


# What importing Megatron-Core sets talking. torch's extension builder warns of nvcc without a GPU.
MEGATRON_LOGGERS = ("megatron.core", "torch.utils.cpp_extension")


def quiet_libraries() -> None:
    """Keep third-party notices off the user's screen; call before importing Megatron or DeepSpeed.

    Their warnings name parts that are not used here (Transformer Engine, Apex, an accelerator).
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*|deepspeed\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("DeepSpeed", "torch.distributed", *MEGATRON_LOGGERS):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Megatron overlaps the input gradient's all-reduce with the weight gradient only in this order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def cpu_environment(ranks: int) -> dict[str, str]:
    """This process' environment, for a launcher that is to run `ranks` ranks on the CPU."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
    }


def communication_environment() -> dict[str, str]:
    """What is set of the variables that choose devices, threads, interfaces and transport."""
    chosen = ("GLOO_", "NCCL_", "TORCH_NCCL_", "UCX_", "FI_")
    names = (
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    return {k: v for k, v in os.environ.items() if k.startswith(chosen) or k in names}


def launched_world() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; (0, 1, 0) for plain `python`.

    UserError where Slurm started several tasks that would each take itself for all of the job.
    """
    if "RANK" not in os.environ:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        if "SLURM_PROCID" in os.environ and tasks != "1":
            raise UserError(
                f"srun started {tasks} tasks without RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                "and MASTER_PORT; set these for each task, or start the deepspeed launcher"
            )
        return 0, 1, 0
    return (
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def check_ranks(world_size: int, tensor: int, micro_batch_size: int, global_batch_size: int) -> int:
    """Data-parallel size, or UserError where the ranks cannot be laid out."""
    if world_size % tensor:
        raise UserError(
            f"{world_size} ranks were started, which parallel.tensor {tensor} does not divide; "
            f"start a multiple of {tensor} ranks, or change parallel.tensor"
        )
    data_size = world_size // tensor
    sequences = micro_batch_size * data_size
    if global_batch_size % sequences:
        raise UserError(
            f"training.global_batch_size {global_batch_size} does not divide by {sequences} "
            f"(training.micro_batch_size {micro_batch_size} x {data_size} data-parallel ranks: "
            f"{world_size} ranks / parallel.tensor {tensor}); start fewer ranks, or set a "
            f"global batch of {-(-global_batch_size // sequences) * sequences}"
        )
    return data_size


def initialize(tensor: int, timeout: timedelta = timedelta(minutes=30)) -> Topology:
    """Join the job's process group (one process alone without a launcher) and form the groups."""
    from megatron.core import parallel_state

    rank, world_size, local_rank = launched_world()
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if world_size == 1 else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    return Topology(
        tensor=TensorParallel(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_group(),
        ),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_group=parallel_state.get_data_parallel_group(),
        device=device,
    )


def leave_groups() -> None:
    """Forget the layout, so that `initialize` can form another one in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def shut_down() -> None:
    """Leave the job."""
    leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


class DeepSpeedView:
    """Megatron-Core's groups under the names that `deepspeed.initialize(mpu=...)` asks for.

    It must not offer `initialize_sequence_parallel`: DeepSpeed would then take the
    model-parallel size as 1.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

        self.get_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_src_rank = state.get_tensor_model_parallel_src_rank
        self.get_data_parallel_rank = state.get_data_parallel_rank
        self.get_data_parallel_world_size = state.get_data_parallel_world_size
        self.get_data_parallel_group = state.get_data_parallel_group
        self.get_pipeline_model_parallel_rank = state.get_pipeline_model_parallel_rank
        self.get_pipeline_model_parallel_world_size = state.get_pipeline_model_parallel_world_size
        self.get_pipeline_model_parallel_group = state.get_pipeline_model_parallel_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())
