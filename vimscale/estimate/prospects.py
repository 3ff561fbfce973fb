"""What a machine gets from its GPUs, by their properties: kernels, CUDA graphs, bf16, memory, expected images/s."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vimscale.estimate import calibration
from vimscale.estimate.devices import DEVICES, key_of
from vimscale.estimate.planner import USABLE, Planner, Target
from vimscale.estimate.roofline import Fabric
from vimscale.recipe import recipe as recipes

COMPILED = ("sm_80", "sm_90", "sm_100", "gfx942")
"""What tests compile the kernels for."""
_RECIPES = {"vim_tiny": "vim_tiny_in1k", "vim_small": "vim_small_in1k", "vim_base": "vim_base_in1k"}
_IMAGES, _CLASSES = 1_281_167, 1000
"""Of ImageNet-1k, which these recipes train on."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    target: str
    """Its architecture, such as sm_90 or gfx942."""
    memory: int
    """Bytes."""

    @property
    def is_too_old(self) -> bool:
        """Whether it lacks what Triton and bf16 need: compute capability 8.0."""
        return self.target.startswith("sm_") and int(self.target.removeprefix("sm_")) < 80


@dataclass(frozen=True)
class Prospect:
    what: str
    good: bool
    found: str
    fix: str = ""


def prospects(gpus: Sequence[Gpu], peers: bool) -> Iterator[Prospect]:
    """What runs get from these GPUs, at least one. `peers`: whether every GPU can access the memory of every other."""
    yield _kernels(gpus)
    if any(gpu.is_too_old for gpu in gpus):
        yield Prospect("precision", False, "fp32; these GPUs have no bf16 units", "Set parallel.precision=fp32")
    else:
        yield Prospect("precision", True, "bf16 and fp32")
    yield Prospect(
        "CUDA graphs", True,
        "replayed at ZeRO 0-2; not at ZeRO 3, with parallel.context, with augment.buckets or for bags of tiles",
    )  # fmt: skip
    least = min(gpu.memory for gpu in gpus)
    yield Prospect(
        "rank memory", True, f"{least / 1e9:.0f} GB per rank, {USABLE * least / 1e9:.0f} GB of it for tensors"
    )
    yield _peers(len(gpus), peers)
    yield _speed(gpus)


def _kernels(gpus: Sequence[Gpu]) -> Prospect:
    targets = ", ".join(sorted({gpu.target for gpu in gpus}))
    if any(gpu.is_too_old for gpu in gpus):
        fix = "Use GPUs of compute capability 8.0 or newer, or train on CPUs: CUDA_VISIBLE_DEVICES="
        return Prospect("kernels", False, f"Triton supports sm_80 and newer, not {targets}", fix)
    unknown = sorted({gpu.target for gpu in gpus} - {*COMPILED})
    found = f"Triton, compiled for {targets} at the first start"
    if unknown:
        fix = f"Check them before a long run: pytest -m gpu. Tests compile for {', '.join(COMPILED)}"
        return Prospect("kernels", False, f"{found}; nobody tested {', '.join(unknown)}", fix)
    return Prospect("kernels", True, f"{found}, which tests compile ahead of time")


def _peers(count: int, peers: bool) -> Prospect:
    if count == 1:
        return Prospect("peer access", True, "one GPU, which has no peers here")
    if peers:
        return Prospect("peer access", True, f"all {count} GPUs access each other's memory, so NCCL copies directly")
    fix = "Nothing to do if the machine has no NVLink; in a virtual machine, check that ACS and IOMMU allow it."
    return Prospect("peer access", False, "not between all GPUs, so NCCL copies through the host's memory", fix)


def _speed(gpus: Sequence[Gpu]) -> Prospect:
    """Images per second of one GPU, as `plan` predicts them."""
    key = key_of(gpus[0].name)
    if len({gpu.name for gpu in gpus}) > 1:
        return Prospect("images/s", False, "no prediction for GPUs of different kinds")
    if key is None:
        return Prospect("images/s", False, f"no prediction: {gpus[0].name} is not one of {', '.join(DEVICES)}")
    rates = [
        f"{preset} {replayed:,.0f} ({issued:,.0f} without CUDA graphs)"
        for preset, (replayed, issued) in expected(key, gpus[0].memory).items()
    ]
    found = f"per GPU in training, 224 pixels: {', '.join(rates)}"
    return Prospect("images/s", True, f"{found}\n{calibration.basis(DEVICES[key])}")


def expected(key: str, memory: int) -> dict[str, tuple[float, float]]:
    """Images per second that one GPU of `memory` bytes trains on with CUDA graphs and without them, by preset, with
    the recipes for ImageNet-1k.

    Args:
        key: of DEVICES.
    """
    device = DEVICES[key]
    target = Target(key, device, memory, Fabric(1, device.link, 1), None)
    found: dict[str, tuple[float, float]] = {}
    for preset, name in _RECIPES.items():
        recipe = recipes.load(name)
        planner = Planner(recipe, recipe.shape(_CLASSES), target, _IMAGES)
        outlook = planner.outlook(1)
        found[preset] = recipe.batch / outlook.step_s, recipe.batch / outlook.other_s
    return found
