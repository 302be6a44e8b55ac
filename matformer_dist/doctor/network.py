"""Which network interface gloo and NCCL would take on this machine, and why.

Read off their sources. gloo takes the address that the machine's own name resolves to, if it can
bind to it, else the loopback one, to which no other machine can come. NCCL takes InfiniBand where
there is, for data, and for the rest the first interface that is not the loopback or docker's.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from matformer_dist.doctor.finding import Finding, failure, note
from matformer_dist.parallel.topology import communication_environment

_INFINIBAND = Path("/sys/class/infiniband")
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_LOOPBACK = "lo"
Addresses = Mapping[str, list[str]]  # of an interface


def network() -> Iterator[Finding]:
    variables = communication_environment()
    addresses = interface_addresses()
    shown = "; ".join(
        f"{name} {', '.join(found) or 'no address'}" for name, found in addresses.items()
    )
    yield Finding("interfaces", shown or "none")
    yield infiniband(_INFINIBAND, variables)
    yield gloo(variables, addresses, socket.gethostname())
    yield nccl(variables, addresses)
    text = ", ".join(f"{key}={value}" for key, value in sorted(variables.items()))
    yield Finding("variables", text or "none of those that choose how ranks communicate")


def interface_addresses() -> dict[str, list[str]]:
    """IPv4 and IPv6 addresses by interface, as Linux names them."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for name in found:
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:  # no such address
                continue
            found[name].append(socket.inet_ntoa(answer[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def gloo(variables: Mapping[str, str], addresses: Addresses, host: str) -> Finding:
    asked = variables.get("GLOO_SOCKET_IFNAME")
    if asked:
        absent = [name for name in asked.split(",") if name not in addresses]
        if absent:
            return failure(
                "gloo",
                f"{asked}, as GLOO_SOCKET_IFNAME says",
                f"GLOO_SOCKET_IFNAME names "
                f"{', '.join(absent)}, which is no interface here ({', '.join(addresses)}); set it "
                "to one of these",
            )
        return Finding("gloo", f"{asked}, as GLOO_SOCKET_IFNAME says")
    address = _own_address(host)
    if address is None:
        why, name = f"this machine's name {host} resolves to no address of its own", _LOOPBACK
    else:
        name = next((n for n, found in addresses.items() if address in found), "unknown")
        if address.startswith("127.") or address == "::1":
            name = _LOOPBACK
        why = f"this machine's name {host} resolves to {address}"
    text = f"{name}, because {why}"
    others = [n for n, found in addresses.items() if n != _LOOPBACK and found]
    if name != _LOOPBACK:
        return Finding("gloo", text)
    return note(
        "gloo",
        text,
        f"{why}: ranks on other machines could not reach gloo here. For runs over "
        f"several, set GLOO_SOCKET_IFNAME={others[0] if others else 'INTERFACE'} (under the "
        "deepspeed launcher in ~/.deepspeed_env), or mend /etc/hosts",
    )


def _own_address(host: str) -> str | None:
    """The first address of that name that can be bound to, as gloo looks for it."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_UNSPEC, socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return str(address[0])
    return None


def nccl(variables: Mapping[str, str], addresses: Addresses) -> Finding:
    usable = [name for name, found in addresses.items() if found]
    asked = variables.get("NCCL_SOCKET_IFNAME")
    if asked:
        chosen = [name for name in usable if _matches(name, asked)]
        text = f"{', '.join(chosen) or 'none'}, as NCCL_SOCKET_IFNAME={asked} says"
        if not chosen:
            return failure(
                "NCCL",
                text,
                f"NCCL_SOCKET_IFNAME={asked} leaves none of the "
                f"interfaces here ({', '.join(usable)}); set it to one of these",
            )
        return Finding("NCCL", text)
    groups = (
        [name for name in usable if name.startswith("ib")],
        [name for name in usable if not name.startswith((_LOOPBACK, "docker", "virbr"))],
        [name for name in usable if name.startswith("docker")],
        [name for name in usable if name.startswith(_LOOPBACK)],
    )
    chosen = next((group for group in groups if group), [])
    text = f"{', '.join(chosen) or 'none'}, as no NCCL_SOCKET_IFNAME says otherwise"
    if chosen and len(chosen) > 1 and not groups[0]:
        return note(
            "NCCL",
            text,
            f"NCCL would use several interfaces ({', '.join(chosen)}): if "
            "not all of them reach the other machines, NCCL_SOCKET_IFNAME=NAME chooses",
        )
    return Finding("NCCL", text)


def _matches(name: str, pattern: str) -> bool:
    """NCCL's list of beginnings of names: ^ before it for all others, = for whole names."""
    inverted, rest = pattern.startswith("^"), pattern.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    parts = [part for part in rest.split(",") if part]
    found = name in parts if exact else name.startswith(tuple(parts))
    return found != inverted


def infiniband(root: Path, variables: Mapping[str, str]) -> Finding:
    ports = []
    for port in sorted(root.glob("*/ports/*")):
        state, layer, rate = (_line(port / key) for key in ("state", "link_layer", "rate"))
        ports.append((f"{port.parts[-3]}:{port.name}", state.partition(": ")[2], layer, rate))
    if not ports:
        return Finding("InfiniBand", "no devices")
    text = "; ".join(" ".join(port) for port in ports)
    if variables.get("NCCL_IB_DISABLE") == "1":
        return note(
            "InfiniBand",
            text,
            "NCCL_IB_DISABLE=1 keeps NCCL from the InfiniBand or "
            "RoCE devices here: machines talk over sockets, many times slower; unset it",
        )
    if not any(state == "ACTIVE" for _, state, _, _ in ports):
        return note(
            "InfiniBand",
            text,
            "no port of the InfiniBand devices here is ACTIVE: NCCL "
            "falls back to sockets; look at cables and the subnet manager",
        )
    return Finding("InfiniBand", text)


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"
