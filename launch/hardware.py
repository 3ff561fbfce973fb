"""What this machine has, as far as this process may use it: CPUs, memory, GPUs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its container."""
    usable = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        granted, period = quota.read_text().split()
        if granted != "max":
            usable = min(usable, max(1, int(granted) // int(period)))
    return usable


class Memory(NamedTuple):
    """Bytes of this machine, as far as this process may have them."""

    total: int
    available: int
    limited: bool
    """Whether that is a container's or a job's limit."""


def memory() -> Memory:
    """Memory of this machine, or of the control group that this process is in, where that has less."""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    found = Memory(int(kib["MemTotal"]) * 1024, int(kib["MemAvailable"]) * 1024, False)
    for limit, used in _control_groups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")):
        if limit < found.total or limit - used < found.available:
            found = Memory(min(limit, found.total), min(max(limit - used, 0), found.available), True)
    return found


def _control_groups(membership: str, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of a process's control group and of those above it, below `root`."""
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
    """CUDA or ROCm devices of this machine, without importing torch where there is no driver."""
    if not (Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count()
