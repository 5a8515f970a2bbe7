"""What a few devices can do at most, as their makers publish it."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
DEVICES_OF_A_NODE = 8


@dataclass(frozen=True)
class Device:
    """A device's peak figures.

    Attributes:
        tflops: peak of dense bf16 products accumulated in fp32, 10^12 operations a second.
        fp32_tflops: peak of fp32 products, in which norms are computed.
        memory: GiB.
        link: what a device receives from others of its node, one direction, 10^9 bytes a second.
        network: what a node of eight receives from other nodes, 10^9 bytes a second.
    """

    tflops: float
    fp32_tflops: float
    memory: float
    link: float
    network: float

    def bandwidth(self, devices: int) -> float:
        """Bytes a second at which every device can receive what all of them hold together.

        A ring over several nodes crosses the network once per node, by the adapters of all its devices.
        """
        return 1e9 * (self.link if devices <= DEVICES_OF_A_NODE else min(self.link, self.network))


# NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and L40S, and the whitepaper of the Ada architecture;
# without sparsity. NVLink is half of the published sum of both directions; PCIe is generation 4 with 16 lanes. The
# network is one adapter of 400 (A100: 200) Gbit/s per device, as in NVIDIA's own machines, and assumed for PCIe cards.
DEVICES = {
    "A100": Device(tflops=312, fp32_tflops=19.5, memory=80, link=300, network=200),
    "H100": Device(tflops=989, fp32_tflops=67, memory=80, link=450, network=400),
    "H200": Device(tflops=989, fp32_tflops=67, memory=141, link=450, network=400),
    "L40S": Device(tflops=362, fp32_tflops=91.6, memory=48, link=32, network=25),
    "RTX4090": Device(tflops=165, fp32_tflops=82.6, memory=24, link=32, network=25),
}


def device_named(name: str) -> Device:
    """The device of :data:`DEVICES`, however its name is spelled.

    >>> device_named("rtx 4090").memory
    24

    Raises:
        ValueError: there is no such device.
    """
    key = name.upper().replace(" ", "").replace("-", "")
    if key not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}; or give --memory and --peak")
    return DEVICES[key]
