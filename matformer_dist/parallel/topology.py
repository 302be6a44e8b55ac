"""Process groups: who shares a model (tensor parallel) and who shares a step (data parallel).

Megatron-Core owns the groups; DeepSpeed is shown them through `DeepSpeedView`. This file and
launch/ are the only places that read environment variables.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from matformer_dist.errors import LocalError, UserError
from matformer_dist.parallel.agreement import gathered
from matformer_dist.parallel.sequence import RowExchange

_FIRST_PORT, _PORTS = 20_000, 12_000  # of the ports that Slurm's jobs meet at


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that hold one copy of the model together; `group` is None for a single one.

    rows: how rows go to and from the ranks that they are cut over (see sequence.py); None where
    every rank has all of them.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    rows: RowExchange | None = None

    def with_cut_rows(self) -> TensorParallel:
        assert self.group is not None, "the configuration refuses it on a single rank"
        return replace(self, rows=RowExchange(self.size, self.group.group_name))

    def with_whole_rows(self) -> TensorParallel:
        return replace(self, rows=None)

    def gather(self, statistics: torch.Tensor) -> torch.Tensor:
        """All ranks' values of a small tensor [n, k] as [T, n, k], by one all-gather."""
        if self.size == 1:
            return statistics.unsqueeze(0)
        return self.start_gather(statistics)()

    def start_gather(self, statistics: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The same, started: what is returned waits for it; until then other work goes on."""
        local = statistics.contiguous()
        out = local.new_empty((self.size * local.shape[0], *local.shape[1:]))
        work = dist.all_gather_into_tensor(out, local, group=self.group, async_op=True)

        def finish() -> torch.Tensor:
            assert work is not None
            work.wait()
            return out.view(self.size, *local.shape)

        return finish


SINGLE = TensorParallel()


@dataclass(frozen=True)
class Topology:
    """This process' place in the job."""

    tensor: TensorParallel
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    device: torch.device
    hosts: tuple[str, ...]  # of each rank of the job

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes the run's own files."""
        return dist.get_rank() == 0

    @property
    def world_size(self) -> int:
        return self.tensor.size * self.data_size

    def hosts_of_split_groups(self) -> list[str]:
        """All hosts with a part only of a copy of the model: its tensor-parallel ranks, which are
        neighbours by number, are on several.
        """
        size = self.tensor.size
        groups = [set(self.hosts[i : i + size]) for i in range(0, self.world_size, size)]
        return sorted({host for group in groups if len(group) > 1 for host in group})


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

    RANK, WORLD_SIZE and LOCAL_RANK, which the deepspeed launcher and torchrun set, come first; else
    this task's place in a step of Slurm's srun. A shell of sbatch or salloc is no step: plain
    python is one process there. UserError where the values cannot be.
    """
    if "RANK" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        default = {"LOCAL_RANK": "0"}
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        default = {}
    else:
        return 0, 1, 0
    texts = [os.environ.get(name, default.get(name, "")) for name in names]
    if all(text.isdecimal() for text in texts):
        rank, world_size, local_rank = map(int, texts)
        if local_rank <= rank < world_size:
            return rank, world_size, local_rank
    values = ", ".join(f"{n} is {os.environ.get(n, 'not set')}" for n in names)
    raise UserError(
        f"the launcher's variables make no sense together: {values}; they must be numbers, with a "
        "rank from 0 on below the number of ranks and a local rank not above it. Set all of them "
        "or none, or let srun, deepspeed or torchrun do it"
    )


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes, which may be as short as `gpu-a[001-004,7],b2`."""
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", nodes)
    if first is None:
        raise UserError(
            f"no name of a node in {nodes!r}, which Slurm set for this step; set MASTER_ADDR to "
            "the name of the node that rank 0 runs on"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _meeting_point() -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for a step of Slurm: the same for all of its tasks.

    Jobs that share a node have ports of their own, as far as they go; below those that the system
    gives to outgoing connections.
    """
    job, step = (int(os.environ.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID"))
    port = _FIRST_PORT + (job * 7 + step) % _PORTS
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    return {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": str(port)}


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
    device = _device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        local_rank = device.index
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes it for the device's number
    if world_size > 1 and "RANK" not in os.environ:
        for name, value in _meeting_point().items():
            os.environ.setdefault(name, value)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if world_size == 1 else None
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
        except dist.DistNetworkError as error:
            raise _not_met(rank, str(error)) from error
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, create_gloo_process_groups=False
    )
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
        hosts=tuple(gathered(socket.gethostname())),
    )


def _not_met(rank: int, error: str) -> LocalError:
    point = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in error:
        return LocalError(
            f"rank {rank} cannot listen at {point}, where the ranks are to meet: the port is in "
            "use, most likely by another run on this machine; give this one a port of its own "
            "(deepspeed --master_port, else MASTER_PORT)"
        )
    reason = next(iter(error.splitlines()), "no reason is told")
    return LocalError(
        f"rank {rank} cannot meet the others at {point} ({reason}); MASTER_ADDR and "
        "MASTER_PORT must name a port of rank 0's machine that all can reach"
    )


def _device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU. Where Slurm shows a task its own GPU only, that is number 0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise LocalError(
            f"local rank {local_rank} has no GPU: {visible} are visible here; start one "
            f"rank a GPU (srun --ntasks-per-node={visible}, slots={visible} in a hostfile)"
        )
    return torch.device("cuda", local_rank)


def leave_groups() -> None:
    """End the layout and its groups, so that `initialize` can form another one in this process.

    All ranks together: a group that lives on keeps three threads of gloo that wake up all the time.
    """
    from megatron.core import parallel_state

    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    dist.barrier()  # what another rank still reads must not be cut off
    for group in groups:
        if group is not None:  # which stands for all ranks' own
            dist.destroy_process_group(group)


def shut_down() -> None:
    """Leave the job."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
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
