"""The CPUs, memory and GPUs of this machine that this process may use."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def cpus() -> int:
    """Return how many CPUs this process may use, by its affinity and the quota of its container."""
    usable = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        granted, period = quota.read_text().split()
        if granted != "max":
            usable = min(usable, max(1, int(granted) // int(period)))
    return usable


class Memory(NamedTuple):
    """Memory that this process may use, in bytes."""

    total: int
    available: int
    limited: bool
    """Whether a container or a job sets the limit."""


def memory() -> Memory:
    """Return the memory of this machine, or of this process's control group where that has less."""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    found = Memory(int(kib["MemTotal"]) * 1024, int(kib["MemAvailable"]) * 1024, False)
    for limit, used in _control_groups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")):
        if limit < found.total or limit - used < found.available:
            found = Memory(min(limit, found.total), min(max(limit - used, 0), found.available), True)
    return found


def _control_groups(membership: str, root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use that cannot be dropped) of a process's control group and its parents up to `root`."""
    own = re.search(r"^0::(/.*)$", membership, re.MULTILINE)
    folder = root / own[1].strip("/") if own is not None else root
    for group in (folder, *folder.parents):
        if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
            dropped = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            used = int((group / "memory.current").read_text()) - (int(dropped[1]) if dropped is not None else 0)
            yield int(limit), used
        if group == root:
            break
    if (old := root / "memory" / "memory.limit_in_bytes").exists():  # version 1
        yield int(old.read_text()), int(old.with_name("memory.usage_in_bytes").read_text())


def gpus() -> int:
    """Return how many CUDA or ROCm devices this machine has, without importing torch where there is no driver."""
    if not (Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count()


def nvidia_devices(folder: Path = Path("/dev")) -> int:
    """Return how many CUDA devices this process probably sees, at no cost. `gpus` knows for sure."""
    devices = sum(1 for device in folder.glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if visible is None else min(devices, len(visible.split(",")) if visible else 0)
