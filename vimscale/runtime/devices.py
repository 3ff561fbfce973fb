"""The hardware that ranks compute on. Imports torch only where a rank or `doctor` asks for its device."""

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cpu_name() -> str:
    """The model of this machine's CPUs.

    Raises:
        FileNotFoundError: there is no /proc/cpuinfo.
    """
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, "?" if it does not say; None if there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.findall(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[0] if found else "?"


def describe(device: "torch.device") -> dict[str, Any]:
    """What a rank computes on: `name` and `memory` (bytes) of its GPU, the versions of the driver and of CUDA or ROCm;
    on CPUs their model and the machine's memory.
    """
    import torch

    try:
        cpu = cpu_name()
    except OSError:
        cpu = platform.machine()
    if device.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"kind": "cpu", "name": cpu, "memory": _rounded(memory)}
    properties = torch.cuda.get_device_properties(device)
    memory = _rounded(properties.total_memory)
    found: dict[str, Any] = {"kind": "gpu", "name": properties.name, "memory": memory, "cpu": cpu}
    if torch.version.hip:
        return found | {"rocm": torch.version.hip, "capability": properties.gcnArchName.partition(":")[0]}
    capability = f"{properties.major}.{properties.minor}"
    return found | {"driver": nvidia_driver(), "cuda": torch.version.cuda, "capability": capability}


def _rounded(size: int) -> int:
    """Bytes to the nearest 0.1 GB: equal machines differ by less."""
    return round(size, -8)


def of_all_ranks(device: "torch.device") -> list[dict[str, Any]]:
    """What all ranks compute on, equal devices once, with the number of `ranks` and their `hosts`. All ranks call it;
    the first entry is that of rank 0.
    """
    import torch.distributed as dist

    own = (describe(device), platform.node())
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    found: list[dict[str, Any]] = []
    for each, _ in everywhere:
        if each not in found:
            found.append(each)
    return [
        device
        | {"ranks": sum(each == device for each, _ in everywhere)}
        | {"hosts": sorted({host for each, host in everywhere if each == device})}
        for device in found
    ]
