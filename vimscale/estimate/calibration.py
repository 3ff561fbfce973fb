"""What fraction of its data sheet a device reaches, by kind of work, and what a launch costs its host: measured.

`python -m benchmarks.gpu.fit` computes an entry from the file of a run of `benchmarks.gpu`, and prints how far each
measured row is from what the table says. docs/plan.md has the residuals.
"""

from dataclasses import dataclass

from vimscale.estimate.devices import Device
from vimscale.model import VimConfig


@dataclass(frozen=True)
class ScanRate:
    """A program scans some channels of one image in one direction; a program's step is one token."""

    channels: int
    """Of a program."""
    resident: int
    """Programs that a multiprocessor holds at a time, by their registers."""
    alone: float
    """Clocks of a step if a multiprocessor holds few programs: latency."""
    shared: float
    """Clocks of a step per program that a multiprocessor holds, if there are many: throughput."""


@dataclass(frozen=True)
class Rates:
    run: str
    """The run that they come from."""
    products: float
    """Fraction of the device's rate of matrix products that these reach, apart from their bytes."""
    product_bytes: float
    """This and the next five: fraction of the memory's bandwidth; bytes that caches serve can take it above 1."""
    unaligned_bytes: float
    convolution_bytes: float
    gate_bytes: float
    norm_bytes: float
    other_bytes: float
    attention: float
    """Fraction of the device's rate of matrix products."""
    forward: ScanRate
    backward: ScanRate
    launch_s: float
    """Seconds of the host per launch."""
    checkpoint_s: float
    """Seconds of the host per layer that is recomputed as a block, in addition to its launches."""
    engine_s: float
    """Seconds of the host per parameter tensor and step: the engine, clipping, the moving average, the guard."""


RATES = {
    "h100": Rates(
        run="one H100 (80 GB, SXM), commit ba86e9f, torch 2.11, triton 3.6, 2026-11-26",
        products=0.803,
        product_bytes=1.085,
        unaligned_bytes=0.1166,
        convolution_bytes=0.3185,
        gate_bytes=0.841,
        norm_bytes=0.809,
        other_bytes=0.454,
        attention=0.419,
        forward=ScanRate(channels=64, resident=5, alone=459.5, shared=171.0),
        backward=ScanRate(channels=64, resident=2, alone=821.4, shared=446.7),
        launch_s=70.2e-6,
        checkpoint_s=2.63e-3,
        engine_s=461e-6,
    ),
}
"""By name of the device."""
NEAREST = "h100"
"""The rates of devices that nobody measured."""


def rates_of(device: Device) -> Rates:
    return RATES.get(device.name, RATES[NEAREST])


def basis(device: Device, config: VimConfig | None = None) -> str:
    """Where the times of a plan for this device come from, in words; `config`: the model, if that is known."""
    measured = RATES[NEAREST].run
    if device.name not in RATES:
        return (
            f"predicted, not calibrated: nobody measured {device.name}, so the fractions of the data sheet that an"
            f" {NEAREST} reaches, and its host's times, stand for it ({measured})"
        )
    if config is not None and any(layer.is_ssd for layer in config.layers):
        return (
            "predicted, not calibrated: nobody measured ssd layers, so their products count at the rate of others"
            f" ({measured})"
        )
    return f"calibrated: {measured}; what has become faster since is not in it"
