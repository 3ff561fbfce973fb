"""How long a step takes: the device's kernels, the host that issues them, and collectives at the fabric's rate.

kernels = sum over kinds of work of amount / (fraction measured x data sheet)
host    = launches x seconds per launch + recomputed layers x seconds + parameter tensors x seconds of the engine
step    = max(kernels, host) if every launch is issued; max(kernels, the engine's part of host) if a CUDA graph is
          replayed; what ranks exchange that share images is added; collectives are added, or overlap at stage 3.
"""

import math
from dataclasses import dataclass

from vimscale.engine.zero_layout import Sent
from vimscale.estimate.calibration import Rates, ScanRate
from vimscale.estimate.context import Exchanged
from vimscale.estimate.devices import Device
from vimscale.estimate.work import Scan, Work

STATE = 16
"""Numbers per channel in all measured scans."""
FABRIC = 0.8
"""Fraction of the links' bandwidth that collectives reach; assumed."""
LATENCY = 10e-6
"""Seconds that a collective takes for each doubling of the number of ranks; assumed."""
HOST = 25e9
"""Bytes/s from a device to its host's memory, for checkpoints; assumed."""


def kernels(device: Device, rates: Rates, work: Work) -> dict[str, float]:
    """Seconds of the device by kind of work."""
    forward = sum(scan_units(device, rates.forward, scan) for scan in work.scans if not scan.backward)
    backward = sum(scan_units(device, rates.backward, scan) for scan in work.scans if scan.backward)
    flops = work.product_flops / device.bf16 + work.fp32_flops / device.fp32
    touched = work.product_bytes / rates.product_bytes + work.unaligned_bytes / rates.unaligned_bytes
    return {
        "scan forward": forward / device.clock,
        "scan backward": backward / device.clock,
        "products": flops / rates.products + touched / device.bandwidth,
        "attention": work.attention_flops / (rates.attention * device.bf16),
        "convolution": work.convolution_bytes / (rates.convolution_bytes * device.bandwidth),
        "gate": work.gate_bytes / (rates.gate_bytes * device.bandwidth),
        "norm": work.norm_bytes / (rates.norm_bytes * device.bandwidth),
        "other": work.other_bytes / (rates.other_bytes * device.bandwidth),
    }


def programs(rate: ScanRate, scan: Scan) -> int:
    return round(scan.directions * scan.images) * math.ceil(scan.width / rate.channels)


def scan_units(device: Device, rate: ScanRate, scan: Scan) -> float:
    """Clocks of a scan. Its programs run in waves: a full one holds `resident` programs on every multiprocessor, the
    last one as many as are left. A wave takes as long as a program alone, or longer if many share a multiprocessor.
    """
    full, left = divmod(programs(rate, scan), rate.resident * device.processors)
    per_step = full * _wave(rate, rate.resident)
    if left:
        per_step += _wave(rate, math.ceil(left / device.processors))
    return scan.tokens * scan.state / STATE * per_step


def _wave(rate: ScanRate, held: int) -> float:
    return max(rate.alone, held * rate.shared)


def host(rates: Rates, work: Work, checkpoints: int) -> float:
    """Seconds of the host for a micro-batch; `checkpoints`: layers that are recomputed as a block."""
    return work.launches * rates.launch_s + checkpoints * rates.checkpoint_s


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

    def exchange_seconds(self, exchanged: Exchanged, context: int, world: int) -> float:
        """Seconds that the exchanges of a group of `context` ranks take: rings through the group, and halos from each
        rank to the next at the same time. A group spans nodes if groups do not fill them exactly.
        """
        if context == 1:
            return 0.0
        inside = world <= self.node or self.node % context == 0
        slowest = self.link if inside else min(self.link, self.out)
        around = (exchanged.total - exchanged.halo) * (context - 1) / context
        sent = around + exchanged.halo / (context - 1)
        return sent / (FABRIC * slowest) + exchanged.calls * LATENCY * math.log2(context)


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what limits it."""

    kernels: float
    host: float
    """Of the host, to issue every launch; includes `engine`."""
    engine: float
    """Of the host, for what a CUDA graph of the model does not contain."""
    communication: float
    exchange: float = 0.0
    """Of a group of ranks that share images; layers wait for it."""

    def seconds(self, zero: int, *, graphs: bool) -> float:
        """DeepSpeed overlaps communication with the backward pass at stage 3 only."""
        compute = max(self.kernels, self.engine if graphs else self.host) + self.exchange
        return max(compute, self.communication) if zero == 3 else compute + self.communication
