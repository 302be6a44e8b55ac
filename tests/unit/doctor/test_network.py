"""Which interface is said to be taken, for machines that are made up."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from matformer_dist.doctor import network
from matformer_dist.doctor.finding import Finding

MACHINE = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.7", "fe80::1"],
    "docker0": ["172.17.0.1"],
    "ib0": [],
}


def gloo(variables: dict[str, str], address: str | None, monkeypatch: Any) -> Finding:
    monkeypatch.setattr(network, "_own_address", lambda host: address)
    return network.gloo(variables, MACHINE, "node7")


def test_gloo_takes_the_interface_of_the_machines_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gloo({}, "10.0.0.7", monkeypatch)
    assert found.text == "eth0, because this machine's name node7 resolves to 10.0.0.7"
    assert not found.problem


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1", None])
def test_a_name_that_leads_to_the_loopback_is_a_note(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gloo({}, address, monkeypatch)
    assert found.text.startswith("lo, because this machine's name node7 resolves to ")
    assert "set GLOO_SOCKET_IFNAME=eth0" in found.problem and not found.fails


def test_an_interface_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gloo({"GLOO_SOCKET_IFNAME": "eth0"}, None, monkeypatch).problem
    found = gloo({"GLOO_SOCKET_IFNAME": "eth0,eth9"}, None, monkeypatch)
    assert found.fails and "names eth9, which is no interface here (lo, eth0," in found.problem
    found = network.nccl({"NCCL_SOCKET_IFNAME": "bond"}, MACHINE)
    assert found.fails and "leaves none of the interfaces" in found.problem


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (None, "eth0"),
        ("eth", "eth0"),
        ("=eth", "none"),
        ("=eth0", "eth0"),
        ("^lo,docker", "eth0"),
        ("^=eth0", "lo, docker0"),
        ("docker,eth", "eth0, docker0"),
    ],
)
def test_nccls_choice_follows_its_rules(asked: str | None, taken: str) -> None:
    found = network.nccl({"NCCL_SOCKET_IFNAME": asked} if asked else {}, MACHINE)
    assert found.text.partition(", as ")[0] == taken


def test_nccl_prefers_infiniband_and_comes_to_docker_last() -> None:
    def taken(*names: str) -> str:
        return network.nccl({}, {name: ["10.0.0.1"] for name in names}).text.partition(", as ")[0]

    assert taken("lo", "eth0", "ib0", "ib1") == "ib0, ib1"
    assert taken("lo", "docker0") == "docker0"
    assert taken("lo") == "lo"
    assert "NCCL_SOCKET_IFNAME=NAME" in network.nccl({}, {"a": ["1"], "b": ["2"]}).problem


def test_ports_of_infiniband_are_read(tmp_path: Path) -> None:
    assert network.infiniband(tmp_path / "none", {}).text == "no devices"
    port = tmp_path / "mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "link_layer").write_text("InfiniBand\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    found = network.infiniband(tmp_path, {})
    assert (found.text, found.problem) == (
        "mlx5_0:1 ACTIVE InfiniBand 400 Gb/sec (4X NDR)", "",
    )  # fmt: skip
    assert "NCCL_IB_DISABLE=1" in network.infiniband(tmp_path, {"NCCL_IB_DISABLE": "1"}).problem
    (port / "state").write_text("1: DOWN\n")
    assert "no port" in network.infiniband(tmp_path, {}).problem


def test_this_machines_addresses_are_those_of_its_interfaces() -> None:
    found = network.interface_addresses()
    assert set(found) >= {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1" in found["lo"]
    assert network._own_address("no.such.host.invalid") is None
    assert network._own_address("127.0.0.1") == "127.0.0.1"
    assert network._own_address("192.0.2.77") is None, "of another machine (RFC 5737)"
