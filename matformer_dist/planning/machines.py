"""Devices and clusters: memory, peak rates and links, as their makers give them."""

from __future__ import annotations

from dataclasses import dataclass

from matformer_dist.errors import UserError


@dataclass(frozen=True)
class Device:
    """Dense rates, without sparsity; links of one direction."""

    memory_gib: float  # as the driver shows it
    bf16_tflops: float
    fp32_tflops: float
    link_gb_per_second: float  # to the other devices of its node

    def peak_tflops(self, precision: str) -> float:
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


DEVICES = {
    "a100-40gb": Device(39.6, 312, 19.5, 300),
    "a100-80gb": Device(79.3, 312, 19.5, 300),
    "h100": Device(79.6, 989, 67, 450),
    "h100-pcie": Device(79.6, 756, 51, 64),
    "h200": Device(140.4, 989, 67, 450),
    "b200": Device(179.1, 2250, 75, 900),
    "l40s": Device(45.0, 362, 91.6, 32),
    "rtx4090": Device(24.0, 165, 82.6, 32),
}

_CALLED = {  # by the driver
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def device_called(name: str) -> Device | None:
    """The device that the driver calls so; None for one that is not known."""
    return DEVICES[_CALLED[name]] if name in _CALLED else None


def find_device(name: str) -> Device:
    """The device of that name; UserError for one that is not known."""
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise UserError(
            f"--gpu {name!r} is not known; known are {', '.join(DEVICES)}. For another, set "
            "--memory, --peak-tflops and --link beside the nearest of these"
        ) from None


# Of a device's memory: the driver's context, the libraries' buffers and what the allocator cannot
# join are left the rest.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes. Speeds are of one direction and one device."""

    name: str
    memory_bytes: int
    peak_tflops: float  # dense, of the precision that is trained in
    devices_per_node: int = 8
    link_gb_per_second: float = 450.0  # between devices of a node
    network_gb_per_second: float = 50.0  # of a device's share of the network between nodes
    link_latency_us: float = 5.0  # of a round
    network_latency_us: float = 15.0
    assumed_mfu: float = 0.4  # of the arithmetic alone

    @property
    def usable_bytes(self) -> int:
        """What a run may plan with."""
        return round(USABLE_SHARE * self.memory_bytes)
