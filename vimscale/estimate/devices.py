"""What accelerators can do by their makers' data sheets: what plans assume before anything runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    memory: int
    """Bytes."""
    bf16: float
    """Matrix products, dense, FLOP/s."""
    fp32: float
    """FLOP/s outside the matrix units; also what scans run at."""
    bandwidth: float
    """Of its memory, in bytes/s."""
    link: float
    """To its neighbors in the same node, bytes/s in each direction."""


DEVICES = {
    "b200": Device(180 * 10**9, 2250e12, 75e12, 7.7e12, 900e9),
    "h200": Device(141 * 10**9, 989e12, 67e12, 4.8e12, 450e9),
    "h100": Device(80 * 10**9, 989e12, 67e12, 3.35e12, 450e9),
    "a100": Device(80 * 10**9, 312e12, 19.5e12, 2.04e12, 300e9),
    "a10g": Device(24 * 10**9, 70e12, 31e12, 0.6e12, 32e9),
    "l40s": Device(48 * 10**9, 362e12, 91.6e12, 0.864e12, 32e9),
    "mi300x": Device(192 * 10**9, 1307e12, 163e12, 5.3e12, 448e9),
}


def key_of(name: str) -> str | None:
    """The key in DEVICES of a GPU, from its driver's name for it, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = name.lower().replace("-", " ").split()
    return next((key for key in DEVICES if key in words), None)
