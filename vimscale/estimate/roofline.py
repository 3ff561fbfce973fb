"""How long a step should take: operations at the device's rates, collectives at the fabric's. Predictions only.

An operation takes the longer of two times: its matrix products at a fraction of the data sheet's rate, and its bytes at
a fraction of the memory's bandwidth. The fractions are what well-made kernels reach elsewhere; none was measured here.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vimscale.engine.zero_layout import Sent
from vimscale.estimate.devices import Device

MATRIX = 0.6
"""Fraction of the data sheet's matrix rate that kernels reach."""
MEMORY = 0.8
"""Fraction of the memory's bandwidth that kernels reach."""
FABRIC = 0.8
"""Fraction of the links' bandwidth that collectives reach."""
LATENCY = 10e-6
"""Seconds that a collective takes for each doubling of the number of ranks."""
SCAN = {"vimscale::selective_scan": 18, "vimscale::selective_scan_backward": 40}
"""fp32 operations that take as long as a scan takes for one token, channel and state; from the clock counts of the
machine code in docs/kernels.md.
"""
_NO_WORK = {f"aten::{name}" for name in ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")}
HOST = 25e9
"""Bytes/s from a device to its host's memory, for checkpoints."""
UPDATE = 28
"""Bytes that AdamW reads and writes per element: weight, gradient and two moments in, weight and moments out."""


def operation(device: Device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Seconds of one operation on tensors of these shapes."""
    name = func._schema.name
    if func.is_view or name in _NO_WORK or func.namespace not in ("aten", "vimscale"):
        return 0.0
    if name in SCAN:
        (k, b, length, e), n = args[0].shape, args[2].shape[-1]
        return max(SCAN[name] * k * b * length * e * n / device.fp32, _touched(device, args, kwargs, out))
    flops = 0
    if func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
    narrow = any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in args)
    rate = device.bf16 if narrow else device.fp32
    return max(flops / (MATRIX * rate), _touched(device, args, kwargs, out))


def _touched(device: Device, *values: Any) -> float:
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / (MEMORY * device.bandwidth)


@dataclass(frozen=True)
class Fabric:
    """The network: `node` ranks share a machine, with `link` bytes/s inside it and `out` bytes/s to the others."""

    node: int
    link: float
    out: float

    def seconds(self, sent: Sent, world: int) -> float:
        """Seconds that these collectives take: rings through all ranks of a node and on to the next, as NCCL builds
        them; an all-reduce goes round twice.
        """
        if world == 1:
            return 0.0
        slowest = self.link if world <= self.node else min(self.link, self.out)
        around = (2 * sent.all_reduce + sent.reduce_scatter + sent.all_gather) * (world - 1) / world
        return around / (FABRIC * slowest) + sent.calls * LATENCY * math.log2(world)


def update(device: Device, elements: int) -> float:
    """Seconds that AdamW takes for a rank's `elements`."""
    return UPDATE * elements / (MEMORY * device.bandwidth)


def step(compute: float, communication: float, updating: float, zero: int) -> float:
    """Seconds of a step. DeepSpeed overlaps communication with the backward pass at stage 3 only."""
    return (max(compute, communication) if zero == 3 else compute + communication) + updating
