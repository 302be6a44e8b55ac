"""This process' place in a job, by the variables of its launcher."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch

from matformer_dist.errors import LocalError, UserError
from matformer_dist.parallel import topology
from matformer_dist.parallel.topology import first_host, launched_world
from tests.ports import free_port

STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
POINT = ("MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (*TORCH, *POINT):
            monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, (0, 1, 0)),
        (TORCH, (3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        (STEP, (5, 8, 1)),
        ({**STEP, **TORCH}, (3, 4, 1)),  # torchrun, or the deepspeed launcher, within a task
        # A shell of sbatch: what is started there without srun is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_the_place_in_the_job_matches_the_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], world: tuple[int, int, int]
) -> None:
    _set(monkeypatch, variables)
    assert launched_world() == world


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "1"}, "RANK is 1, WORLD_SIZE is not set, LOCAL_RANK is not set"),
        ({**TORCH, "RANK": "four"}, "RANK is four"),
        ({**TORCH, "RANK": "4"}, "RANK is 4, WORLD_SIZE is 4"),
        ({**STEP, "SLURM_PROCID": "8"}, "SLURM_PROCID is 8, SLURM_STEP_NUM_TASKS is 8"),
        ({**STEP, "SLURM_LOCALID": "6"}, "SLURM_LOCALID is 6"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
    ],
)
def test_variables_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    _set(monkeypatch, variables)
    with pytest.raises(UserError, match="make no sense together") as refused:
        launched_world()
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3,7]", "n1"),
        ("gpu-a[001-004],b2", "gpu-a001"),
        ("b2,gpu-a[001-004]", "b2"),
        ("rack[2,4]-n[03-04]-ib.cluster,x", "rack2-n03-ib.cluster"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[", "n[]", ",n1", "n[-3]", "n[1-3"])
def test_a_list_without_a_first_host_is_refused(nodes: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        first_host(nodes)


def test_tasks_of_a_step_meet_at_one_point_and_other_steps_at_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = set()
    for job, step in [(71, 0), (71, 1), (72, 0), (12071, 0)]:
        _set(monkeypatch, {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        _set(monkeypatch, {"SLURM_JOB_NODELIST": "n[1-9]", "SLURM_STEP_NODELIST": "n[3-4]"})
        point = topology._meeting_point()
        assert point["MASTER_ADDR"] == "n3"
        assert 20_000 <= int(point["MASTER_PORT"]) < 32_000
        points.add(point["MASTER_PORT"])
    assert len(points) == 3  # 12000 jobs apart, ports begin again


@pytest.mark.filterwarnings("ignore:Transformer Engine and Apex")
def test_a_meeting_point_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", free_port()))
        other.listen()
        port = other.getsockname()[1]
        _set(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
        _set(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        with pytest.raises(LocalError, match=f"rank 0 .*127.0.0.1:{port}.* in use.*--master_port"):
            topology.initialize(1)


@pytest.mark.filterwarnings("ignore:Transformer Engine and Apex")
def test_a_meeting_point_where_nobody_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    _set(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    with pytest.raises(LocalError, match=r"rank 1 cannot meet the others at 127\.0\.0\.1"):
        topology.initialize(1, timedelta(seconds=1))


@pytest.mark.parametrize(("visible", "number"), [(1, 0), (4, 2)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(
    monkeypatch: pytest.MonkeyPatch, visible: int, number: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert topology._device(2) == torch.device("cuda", number)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LocalError, match="--ntasks-per-node=2"):
        topology._device(2)
