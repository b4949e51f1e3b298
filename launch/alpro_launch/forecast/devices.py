"""The built-in table of devices: figures of data sheets with their sources, and what is assumed beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from alpro_stream.errors import ConfigError
from alpro_stream.model.operations import peak_per_s

Precision = Literal["fp32", "bf16"]

HERE = "here"
"""The machine that was measured, in place of one of the table."""

SHARE_OF_PEAK = 0.6
"""ASSUMED: share of the peak that matrix products of a model's size reach. With the other operations at the memory's
rate a whole step of the published model comes to 0.32 of an A100's peak, compiled to 0.42; published trainings of
transformers reach 0.3 (BERT by its reference code, MosaicBERT 2023) to 0.57 (PaLM, Chowdhery et al. 2022)."""
SHARE_OF_MEMORY = 0.8
"""ASSUMED: share of the memory's bandwidth that operations reach which read and write in order."""
SHARE_OF_LINK = {"NVLink": 0.75, "PCIe": 0.4, "network": 0.75}
"""ASSUMED: bus bandwidth of a large collective over the bandwidth of the link, as nccl-tests define both. Without
NVLink NCCL goes through the memory of the host."""
CALL_S = 8e-6
"""ASSUMED: what one operation takes to be started from Python (eager PyTorch on a fast core); compiled ones a third."""
COMPILED_SHARE = 1 / 3
"""ASSUMED: kernels that are left of an eager step when it is compiled."""
COMPILED_BYTES = 1 / 2
"""ASSUMED: what these read and write of what the eager operations do."""
LATENCY_S = 15e-6
"""ASSUMED: start of a collective, and each of its hops between nodes."""
CONTEXT_BYTES = 0.6e9
"""ASSUMED: what CUDA and its libraries take of a GPU's memory for each process."""

_NVIDIA = "[NVIDIA {0} data sheet](https://www.nvidia.com/en-us/data-center/{1}/)"
_A100, _H100, _H200, _L40S, _L4 = (
    _NVIDIA.format(name, name.lower()) for name in ("A100", "H100", "H200", "L40S", "L4")
)
_A10G = "[Amazon EC2 G5](https://aws.amazon.com/ec2/instance-types/g5/), which alone has it"
_EC2 = "[Amazon EC2, network of {0}](https://aws.amazon.com/ec2/instance-types/{1}/)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A kind of GPU in the machines that it is rented in.

    Attributes:
        name: as in ``--gpu``.
        product: part of the name by which CUDA knows it.
        peak_per_s: operations a second without sparsity, by number format: tensor cores in bf16, plain ones in fp32.
        memory_bytes: of a GPU.
        memory_per_s: bytes a second of that memory.
        link_per_s: bytes a second of a GPU to the others of its node, one direction.
        link: what that is.
        network_per_s: bytes a second of a whole node to the others, one direction.
        instance: of Amazon EC2, whose network that is.
        sources: where each figure is from, by attribute.
    """

    name: str
    product: str
    peak_per_s: Mapping[Precision, float]
    memory_bytes: float
    memory_per_s: float
    link_per_s: float
    link: str
    network_per_s: float
    instance: str
    sources: Mapping[str, str] = field(default_factory=dict)


def _device(
    name: str,
    product: str,
    tflops: tuple[float, float],
    memory: tuple[float, float],
    link: tuple[str, float],
    network: tuple[str, float],
    sheet: str,
) -> Device:
    """A line of the table.

    Args:
        name: as in ``--gpu``.
        product: part of CUDA's name.
        tflops: bf16 and fp32.
        memory: GB, and GB/s.
        link: name, and GB/s in one direction.
        network: the instance it is of, and Gbit/s.
        sheet: source of all but the network.
    """
    figures = ("peak_per_s", "memory_bytes", "memory_per_s", "link_per_s")
    sources = dict.fromkeys(figures, sheet)
    family = re.sub(r"(de?|en)?(\..*)?$", "", network[0])  # Of the instance, whose page has all its sizes.
    return Device(
        name=name,
        product=product,
        peak_per_s={"bf16": tflops[0] * 1e12, "fp32": tflops[1] * 1e12},
        memory_bytes=memory[0] * 1e9,
        memory_per_s=memory[1] * 1e9,
        link_per_s=link[1] * 1e9,
        link=link[0],
        network_per_s=network[1] / 8 * 1e9,
        instance=network[0],
        sources={**sources, "network_per_s": _EC2.format(network[0], family)},
    )


# Links are given by NVIDIA as the sum of both directions: 600 GB/s of NVLink 3 are 300 in each, PCIe 4 has 32.
_DEVICES = {
    device.name: device
    for device in (
        _device("a100", "A100-SXM4-80GB", (312, 19.5), (80, 2039), ("NVLink 3", 300), ("p4de", 400), _A100),
        _device("a100-40gb", "A100-SXM4-40GB", (312, 19.5), (40, 1555), ("NVLink 3", 300), ("p4d", 400), _A100),
        _device("h100", "H100 80GB HBM3", (989, 67), (80, 3350), ("NVLink 4", 450), ("p5", 3200), _H100),
        _device("h200", "H200", (989, 67), (141, 4800), ("NVLink 4", 450), ("p5en", 3200), _H200),
        _device("l40s", "L40S", (362, 91.6), (48, 864), ("PCIe 4", 32), ("g6e.48xlarge", 400), _L40S),
        _device("l4", "NVIDIA L4", (121, 30.3), (24, 300), ("PCIe 4", 32), ("g6.48xlarge", 100), _L4),
        _device("a10g", "A10G", (70, 35), (24, 600), ("PCIe 4", 32), ("g5.48xlarge", 100), _A10G),
    )
}


def known_devices() -> list[Device]:
    """All of the table."""
    return list(_DEVICES.values())


def find_device(name: str) -> Device:
    """The device of a name, whatever its case.

    Raises:
        ConfigError: not in the table; its names are listed.
    """
    device = _DEVICES.get(name.lower())
    if device is None:
        raise ConfigError(
            f"--gpu {name}: not in the table, which has {', '.join(_DEVICES)}; {HERE} is the machine that "
            "--measured files are from"
        )
    return device


def markdown_table() -> str:
    """The table as docs/forecast.md shows it."""
    head = "| `--gpu` | bf16 / fp32, TFLOP/s | memory, GB | GB/s | link in a node, GB/s | network of a node, GB/s "
    lines = [head + "| from |", "|---|---|---|---|---|---|---|"]
    for device in known_devices():
        peaks = f"{device.peak_per_s['bf16'] / 1e12:g} / {device.peak_per_s['fp32'] / 1e12:g}"
        memory = f"{device.memory_bytes / 1e9:g} | {device.memory_per_s / 1e9:,.0f}"
        network = f"{device.network_per_s / 1e9:g}"
        sources = f"{device.sources['peak_per_s']}; {device.sources['network_per_s']}"
        lines.append(
            f"| `{device.name}` | {peaks} | {memory} | {device.link} {device.link_per_s / 1e9:g} | {network} "
            f"| {sources} |"
        )
    return "\n".join(lines)


def is_of(device: Device, gpu_names: list[str]) -> bool:
    """Whether measured GPUs are of this kind: by their product, with the same peak."""
    # In whole words: an L40S is no L4, and a GH200 no H200.
    product = re.compile(rf"\b{re.escape(device.product)}\b")
    return bool(gpu_names) and all(
        product.search(name) is not None and peak_per_s(name) == device.peak_per_s["bf16"] for name in gpu_names
    )
