"""Rates of a device from the file of a run: `python -m benchmarks.gpu.fit [benchmarks/results/gpu_h100.json]`.

Prints the entry for `vimscale.estimate.calibration.RATES`, and each measured row next to what these rates say. Each
rate comes from as few measurements as can say it:

- latency of a scan: scans alone, with at most one program per multiprocessor, forward, and the rest of both passes
- throughput of a scan, convolution, gate, other: the time of their kernels in steps, where a step has it by kind
- norm: its op alone
- products: their rate alone; the bytes of aligned and unaligned ones are what the other kinds leave of the steps
- attention: what the other kinds leave of the ViT's steps
- launch: walls of steps that wait for the host; checkpoint: of those that recompute blocks; engine: of the trainer
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vimscale.estimate import roofline
from vimscale.estimate.calibration import RATES, Rates, ScanRate
from vimscale.estimate.devices import DEVICES, Device
from vimscale.estimate.work import Scan, Work

Row = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results"
SHAPES = {"forward": (64, 5), "backward": (64, 2)}
"""Channels of a program, and programs that a multiprocessor holds: at ba86e9f four warps of 96 and of 255 registers per
thread, by `vimscale.kernels.aot`. If the kernels have other shapes now, these numbers follow before the fit.
"""
HOST_BOUND = 1.15
"""A wall this many times the kernels waits for the host."""
CASE = ("model", "image_size", "batch", "directions", "recompute")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step that a run has measured, and its work."""

    row: Row
    work: Work

    @property
    def name(self) -> str:
        directions = f" {self.row['directions']}" if self.row["directions"] else ""
        recompute = f" recompute {self.row['recompute']}" if self.row["recompute"] != "none" else ""
        return f"{self.row['model']} {self.row['image_size']}, {self.row['batch']} images{directions}{recompute}"

    @property
    def is_ours(self) -> bool:
        return bool(self.work.scans)

    @property
    def checkpoints(self) -> int:
        """Layers that are recomputed as a block: each scans forward once more."""
        if self.row["recompute"] != "block":
            return 0
        return sum(not scan.backward for scan in self.work.scans) // 2


def steps_of(record: Row) -> list[Measured]:
    """The steps whose work is known."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in CASE)

    works = {key(row): Work.of_json(row["work"]) for row in record["parts"].get("work", ())}
    return [Measured(row, works[key(row)]) for row in record["parts"].get("steps", ()) if key(row) in works]


def fit(record: Row) -> Rates:
    """The rates of the device that a run describes.

    Raises:
        ValueError: the run lacks a part or a measurement that a rate needs; the message names it.
    """
    device = DEVICES[record["device"]]
    steps = steps_of(record)
    ours = [step for step in steps if step.is_ours]
    if not ours:
        raise ValueError("the run has no steps of a Vim with their work; run the parts steps and work")
    rates = Rates(
        run=f"one {record['gpu']}, commit {record['commit']}, torch {record['torch']}, triton {record['triton']},"
        f" {record['date']}",
        products=_only(record, "ceilings")["bf16_flops_per_s"] / device.bf16,
        product_bytes=1.0,
        unaligned_bytes=1.0,
        convolution_bytes=_bytes_rate(device, ours, "convolution"),
        gate_bytes=_bytes_rate(device, ours, "gate"),
        norm_bytes=_norm_rate(record, device),
        other_bytes=_bytes_rate(device, ours, "other"),
        attention=1.0,
        forward=_scan_rate(record, device, ours, "forward"),
        backward=_scan_rate(record, device, ours, "backward"),
        launch_s=0.0,
        checkpoint_s=0.0,
        engine_s=0.0,
    )
    rates = _products(device, rates, ours)
    rates = _attention(device, rates, [step for step in steps if not step.is_ours])
    return _host(record, rates, ours)


def _only(record: Row, part: str) -> Row:
    rows = record["parts"].get(part)
    if not rows:
        raise ValueError(f"the run has no part {part}")
    return rows[0]


def _by_kind(steps: list[Measured], kind: str) -> list[Measured]:
    found = [step for step in steps if kind in step.row.get("kinds_ms", {})]
    if not found:
        raise ValueError(f"no step of the run has the time of its {kind} kernels")
    return found


def _bytes_rate(device: Device, steps: list[Measured], kind: str) -> float:
    found = _by_kind(steps, kind)
    touched = sum(getattr(step.work, f"{kind}_bytes") for step in found)
    return touched / sum(step.row["kinds_ms"][kind] for step in found) * 1e3 / device.bandwidth


def _norm_rate(record: Row, device: Device) -> float:
    """In training the norm reads x in bf16 and the residual in fp32 and writes both; its backward pass reads two
    gradients and the residual and writes two: 28 bytes per number.
    """
    rows = [row for row in record["parts"].get("layers", ()) if (row["op"], row["name"]) == ("add_norm", "vimscale")]
    if not rows:
        raise ValueError("the run has not measured add_norm; run the part layers")
    touched = sum(28 * row["b"] * row["l"] * row["e"] for row in rows)
    return touched / sum(row["both_ms"] for row in rows) * 1e3 / device.bandwidth


def _scan_rate(record: Row, device: Device, steps: list[Measured], which: str) -> ScanRate:
    channels, resident = SHAPES[which]
    latency = ScanRate(channels, resident, alone=1, shared=0)
    throughput = ScanRate(channels, resident, alone=0, shared=1)
    alone = []
    for row in record["parts"].get("scans", ()):
        scan = Scan(which == "backward", row["directions"], row["b"], row["l"], row["e"], row["n"])
        few = roofline.programs(latency, scan) <= device.processors
        if row["name"].startswith("vimscale") and few:
            ms = row["both_ms"] - row["forward_ms"] if scan.backward else row["forward_ms"]
            alone.append(ms / 1e3 * device.clock / roofline.scan_units(device, latency, scan))
    if not alone:
        raise ValueError("the run has no scan with few programs; run the part scans")
    clocks = units = 0.0
    for step in _by_kind(steps, f"scan {which}"):
        scans = [scan for scan in step.work.scans if scan.backward == (which == "backward")]
        if all(roofline.programs(throughput, scan) >= 2 * resident * device.processors for scan in scans):
            clocks += step.row["kinds_ms"][f"scan {which}"] / 1e3 * device.clock
            units += sum(roofline.scan_units(device, throughput, scan) for scan in scans)
    if not units:
        raise ValueError(f"no step of the run fills the device with scans {which}")
    return ScanRate(channels, resident, float(np.mean(alone)), clocks / units)


def _products(device: Device, rates: Rates, steps: list[Measured]) -> Rates:
    """The two rates of bytes that leave the smallest relative errors of the steps' kernels."""
    free = dataclasses.replace(rates, product_bytes=float("inf"), unaligned_bytes=float("inf"))
    left = [step.row["kernels_ms"] / 1e3 - sum(roofline.kernels(device, free, step.work).values()) for step in steps]
    columns = [[step.work.product_bytes, step.work.unaligned_bytes] for step in steps]
    weight = np.array([1e3 / step.row["kernels_ms"] for step in steps])
    amounts = np.array(columns) / device.bandwidth * weight[:, None]
    used = amounts.any(axis=0)
    slowness = np.ones(2)
    slowness[used] = np.linalg.lstsq(amounts[:, used], np.array(left) * weight, rcond=None)[0]
    if (slowness <= 0).any():
        raise ValueError("the steps leave no time for the bytes of products: the run contradicts itself")
    if not used[1]:
        slowness[1] = slowness[0]
    aligned, unaligned = (float(1 / each) for each in slowness)
    return dataclasses.replace(rates, product_bytes=aligned, unaligned_bytes=unaligned)


def _attention(device: Device, rates: Rates, steps: list[Measured]) -> Rates:
    if not steps:
        raise ValueError("the run has no steps of a ViT")
    free = dataclasses.replace(rates, attention=float("inf"))
    weight = np.array([1e3 / step.row["kernels_ms"] for step in steps])
    left = [step.row["kernels_ms"] / 1e3 - sum(roofline.kernels(device, free, step.work).values()) for step in steps]
    seconds, needs = np.array(left) * weight, np.array([s.work.attention_flops for s in steps]) / device.bf16 * weight
    return dataclasses.replace(rates, attention=float(needs @ needs / (needs @ seconds)))


def _host(record: Row, rates: Rates, steps: list[Measured]) -> Rates:
    waiting = [step for step in steps if step.row["wall_ms"] > HOST_BOUND * step.row["kernels_ms"]]
    plain = [step for step in waiting if not step.checkpoints]
    if not plain:
        raise ValueError("no step of the run waits for its host, so the time of a launch is unknown")
    ratios = np.array([step.work.launches / step.row["wall_ms"] * 1e3 for step in plain])
    launch = float(ratios.sum() / (ratios @ ratios))
    spare = [
        (step.row["wall_ms"] / 1e3 - launch * step.work.launches) / step.checkpoints
        for step in waiting
        if step.checkpoints
    ]
    rates = dataclasses.replace(rates, launch_s=launch, checkpoint_s=float(np.mean(spare)) if spare else 0.0)
    row = _only(record, "trainer")
    engine = row["step_ms"] / 1e3 - roofline.host(rates, _bare(row, steps).work, 0)
    return dataclasses.replace(rates, engine_s=max(engine, 0.0) / row["parameter_tensors"])


def _bare(trainer: Row, steps: list[Measured]) -> Measured:
    """The step without an engine of what the trainer trained."""
    wanted = [trainer["model"], trainer["image_size"], trainer["batch"], None, "none"]
    for step in steps:
        if [step.row[name] for name in CASE] == wanted:
            return step
    raise ValueError(f"the run has no bare step of {wanted[:3]}, which its trainer trained")


def residuals(record: Row, rates: Rates) -> list[tuple[str, str, float, float]]:
    """(row, quantity, measured ms, predicted ms) of every step, and of the trainer's."""
    device = DEVICES[record["device"]]
    rows = []
    for step in steps_of(record):
        kernels = sum(roofline.kernels(device, rates, step.work).values())
        if step.is_ours:
            host = roofline.host(rates, step.work, step.checkpoints)
            rows.append((step.name, "wall", step.row["wall_ms"], max(kernels, host) * 1e3))
            if "graph_ms" in step.row:
                rows.append((step.name, "graph", step.row["graph_ms"], kernels * 1e3))
        rows.append((step.name, "kernels", step.row["kernels_ms"], kernels * 1e3))
        if step.is_ours and "kinds_ms" in step.row:
            by_kind = roofline.kernels(device, rates, step.work)
            rows += [(step.name, kind, ms, by_kind[kind] * 1e3) for kind, ms in step.row["kinds_ms"].items()]
    for row in record["parts"].get("trainer", ()):
        bare = _bare(row, steps_of(record))
        host = roofline.host(rates, bare.work, 0) + row["parameter_tensors"] * rates.engine_s
        kernels = sum(roofline.kernels(device, rates, bare.work).values())
        rows.append((f"vimscale launch, {bare.name}", "wall", row["step_ms"], max(kernels, host) * 1e3))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS / "gpu_h100.json")
    record = json.loads(parser.parse_args().file.read_text())
    rates = fit(record)
    print(f'"{record["device"]}": {rates}\n')
    print(f"{'':52}{'':>15}{'measured':>10}{'fitted':>10}{'ratio':>8}{'in the table':>14}{'ratio':>8}")
    known = RATES.get(record["device"], rates)
    for (name, what, ms, said), (*_, stored) in zip(residuals(record, rates), residuals(record, known), strict=True):
        print(f"{name:52}{what:>15}{ms:10.1f}{said:10.1f}{said / ms:8.3f}{stored:14.1f}{stored / ms:8.3f}")


if __name__ == "__main__":
    main()
