"""What accelerators can do by their makers' data sheets. `calibration` says what fraction of it was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    name: str
    memory: int
    """Bytes."""
    bf16: float
    """Matrix products, dense, FLOP/s."""
    fp32: float
    """FLOP/s outside the matrix units."""
    bandwidth: float
    """Of its memory, in bytes/s."""
    link: float
    """To its neighbors in the same node, bytes/s in each direction."""
    processors: int
    """Multiprocessors or compute units."""
    clock: float
    """Of its multiprocessors, boosted, in Hz."""


_TABLE = (
    Device("b200", 180 * 10**9, 2250e12, 75e12, 7.7e12, 900e9, 148, 1.97e9),
    Device("h200", 141 * 10**9, 989e12, 67e12, 4.8e12, 450e9, 132, 1.98e9),
    Device("h100", 80 * 10**9, 989e12, 67e12, 3.35e12, 450e9, 132, 1.98e9),
    Device("a100", 80 * 10**9, 312e12, 19.5e12, 2.04e12, 300e9, 108, 1.41e9),
    Device("a10g", 24 * 10**9, 70e12, 31e12, 0.6e12, 32e9, 80, 1.71e9),
    Device("l40s", 48 * 10**9, 362e12, 91.6e12, 0.864e12, 32e9, 142, 2.52e9),
    Device("mi300x", 192 * 10**9, 1307e12, 163e12, 5.3e12, 448e9, 304, 2.1e9),
)
DEVICES = {device.name: device for device in _TABLE}


def key_of(name: str) -> str | None:
    """The key in DEVICES of a GPU, from its driver's name for it, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = name.lower().replace("-", " ").split()
    return next((key for key in DEVICES if key in words), None)
