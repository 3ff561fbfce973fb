"""Write a model in a format, open it again as its users do, and compare what both compute of the same images.

Axes: b images; images are (b, 3, h, w), normalized, and fp32 like all outputs.
"""

import importlib.metadata
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vimscale
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import for_evaluation, normalise
from vimscale.data.images.choice import check_kind
from vimscale.data.samples import Samples
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import BadSample, CheckpointError, DataError
from vimscale.export import staging
from vimscale.export.formats import base
from vimscale.export.formats.base import Format, Outputs, Source
from vimscale.model import VisionMamba
from vimscale.model.published.quirks import PublishedVim
from vimscale.storage import files

NOISE, IMAGES = 8, 64
"""Images of noise, and of a data set, that both models see."""
_BATCH = 8
Run = Callable[[Tensor], Outputs]


@dataclass(frozen=True)
class Difference:
    """Between one output of two models, over all images."""

    absolute: float
    relative: float
    """To the largest value of the first model."""


@dataclass(frozen=True)
class Comparison:
    images: int
    outputs: dict[str, Difference]
    """Of `features`, and of `logits` if there are any."""
    top1: int | None
    """Images for which both models name the same class; None without logits."""


@dataclass(frozen=True)
class Probe:
    """The images that both models see."""

    images: Tensor
    """Those of noise first."""
    set: str | None
    """Data set of the others; None: there are none."""
    note: str | None = None
    """Why there are none, or fewer."""


@dataclass(frozen=True)
class Report:
    """What parity.json holds."""

    folder: Path
    """Where the export is."""
    comparison: Comparison
    others: dict[str, Comparison]
    """Of further programs in the folder, by the names of their files."""
    tolerance: float
    """Largest relative difference that is allowed."""
    half: Comparison | None
    """fp32 weights against the same in bf16; None: they are exported in fp32."""
    probe: Probe
    files: list[str]
    bytes: int

    @property
    def passed(self) -> bool:
        all_of_them = [self.comparison, *self.others.values()]
        return all(found.relative <= self.tolerance for each in all_of_them for found in each.outputs.values())

    def lines(self) -> list[str]:
        """For people."""
        real = self.comparison.images - NOISE
        images = f"{NOISE} images of noise" + (f" and {real} of {self.probe.set}" if real else "")
        found = self.comparison
        if all(each.absolute == 0 for each in found.outputs.values()):
            lines = [f"loaded again, it gives the same {' and '.join(found.outputs)} for {images}"]
        else:
            lines = [f"loaded again, it differs for {images}: {_text(found)}; allowed: {self.tolerance:.0e}"]
        lines += [f"{file} differs: {_text(other)}" for file, other in self.others.items()]
        if self.half is not None:
            lines.append(f"the weights of products are in bf16, which itself changes: {_text(self.half)}")
        return [*lines, *filter(None, [self.probe.note])]


def _text(found: Comparison) -> str:
    parts = [f"{name} by {each.absolute:.1e} ({each.relative:.1e})" for name, each in found.outputs.items()]
    if found.top1 is not None:
        parts.append(f"the same class for {found.top1} of {found.images}")
    return ", ".join(parts)


def half(model: VisionMamba) -> None:
    """Round the weights that only enter products (`VisionMamba.product_weights`) to bf16, in place."""
    with torch.no_grad():
        for name in model.product_weights():
            weight = model.get_parameter(name)
            weight.copy_(weight.bfloat16())


def written(
    name: str,
    target: Path,
    source: Source,
    probe: Probe,
    extra: Callable[[Path], None] = lambda folder: None,
) -> Report:
    """Write a model to the folder `target` in the format `name` with parity.json, and compare. A model that does not
    pass is written too; if something was there before, that stays, and the new folder is next to it as NAME_failed.

    Args:
        source: if its weights are to be in bf16, they are fp32 here; this rounds them, in place.
        probe: the images to compare with.
        extra: writes more files into the folder.

    Raises:
        CheckpointError: the format cannot hold the model, its values are not finite, or `target` is no place for it.
        OSError: names a file that cannot be written.
    """
    to = base.of(name)
    to.check(source)
    staging.check(target)
    expected = outputs(run_of(source.model), probe.images)
    if not all(bool(value.isfinite().all()) for value in expected.values()):
        raise CheckpointError("the model gives values that are not finite for images of noise: its run diverged")
    rounding = None
    if source.half:
        half(source.model)
        before, expected = expected, outputs(run_of(source.model), probe.images)
        rounding = compared(before, expected)
    with staging.replacing(target) as made:
        to.write(made.folder, source)
        extra(made.folder)
        found = compared(expected, outputs(to.reopen(made.folder), probe.images))
        others = {file: compared(expected, outputs(run, probe.images)) for file, run in to.others(made.folder).items()}
        names = staging.contents(made.folder)
        size = sum((made.folder / each).stat().st_size for each in names)
        report = Report(target, found, others, to.tolerance, rounding, probe, names, size)
        if not report.passed and target.is_dir() and any(target.iterdir()):
            made.target = made.target.with_name(f"{made.target.name}_failed")
            report = replace(report, folder=target.with_name(made.target.name))
        files.write(made.folder / staging.REPORT, json.dumps(_tree(name, to, report), indent=1) + "\n")
    return report


def _tree(name: str, to: Format, report: Report) -> dict[str, Any]:
    packages = [re.split(r"[^\w.-]", pip)[0] for pip in ("torch", *to.needs.values())]
    versions = {package: importlib.metadata.version(package) for package in packages}
    real = report.comparison.images - NOISE
    return {
        "format": name,
        "passed": report.passed,
        "tolerance": report.tolerance,
        **_comparison_tree(report.comparison),
        "others": {file: _comparison_tree(other) for file, other in report.others.items()},
        "images": {"noise": NOISE, "real": real, "set": report.probe.set},
        "bf16": None if report.half is None else _comparison_tree(report.half),
        "note": report.probe.note,
        "device": "cpu",
        "versions": {"vimscale": vimscale.__version__, **versions},
        "files": report.files,
    }


def _comparison_tree(found: Comparison) -> dict[str, Any]:
    """JSON has no infinity: null."""
    outputs = {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(each).items()}
        for name, each in found.outputs.items()
    }
    return {"outputs": outputs, "top1_agreement": None if found.top1 is None else found.top1 / found.images}


# ---- images


def probe(model: VisionMamba, manifest: Manifest, data: str | None, *, asked: bool, cache: str = "100GB") -> Probe:
    """Make the images to compare with: noise, and up to IMAGES of the set `data`, spread evenly over it (over its first
    shard, if it is not on this machine).

    Args:
        manifest: mean and std.
        data: a data set; None: there is none.
        asked: whether a user asked for this set, so that it must be there.

    Raises:
        DataError: the set cannot be read, and it was asked for.
    """
    channels = model.arguments["channels"] if isinstance(model, PublishedVim) else 3
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE, channels, *model.config.size, generator=draws)
    why = "there is no validation set" if data is None else None
    if channels != 3 or model.config.tiles is not None:
        why = f"the model takes {'bags of tiles' if channels == 3 else f'images of {channels} channels'}"
    elif data is not None:
        try:
            real = _real(data, cache, model.config.size, manifest)
            return Probe(torch.cat([noise, *real]), data if real else None)
        except DataError as error:
            if asked:
                raise
            why = str(error).splitlines()[0]
    return Probe(noise, None, f"compared with noise only, because {why}; --data SET compares with images, too")


def _real(data: str, cache: str, size: tuple[int, int], manifest: Manifest) -> list[Tensor]:
    opened = Dataset.open(data, cache)
    check_kind(opened.manifest, None)
    samples = Samples(opened)
    count = int(opened.counts[0]) if opened.remote else len(samples)
    mean, std = torch.tensor(manifest.mean), torch.tensor(manifest.std)
    images = []
    for i in range(min(IMAGES, count)):
        try:
            pixels = samples[i * count // min(IMAGES, count)].image
        except BadSample:
            continue
        assert isinstance(pixels, Tensor)
        images.append(normalise(for_evaluation(pixels, size), mean, std)[None])
    return images


# ---- outputs


def run_of(model: VisionMamba) -> Run:
    """What a format's `reopen` returns, of a model of ours. A published model that draws random numbers draws the same
    ones for the same batch.
    """

    def run(images: Tensor) -> Outputs:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = {"features": model(images, features=True)}
            if headless(model):
                return found
            if not isinstance(model, PublishedVim):
                assert model.head is not None
                return found | {"logits": model.head(found["features"]).float()}
            torch.manual_seed(0)
            return found | {"logits": model(images)}

    return run


def headless(model: VisionMamba) -> bool:
    return model.arguments["num_classes"] < 1 if isinstance(model, PublishedVim) else model.head is None


def without_head(model: VisionMamba) -> VisionMamba:
    """Return the encoder alone, with the same weights."""
    made: VisionMamba
    if isinstance(model, PublishedVim):
        made = PublishedVim(model.arguments | {"num_classes": 0})
    else:
        made = VisionMamba(replace(model.config, num_classes=0))
    made.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    made.backward = model.backward
    return made.eval()


def outputs(run: Run, images: Tensor) -> Outputs:
    """Run on all images, a few at a time."""
    parts = [run(batch) for batch in images.split(_BATCH)]
    return {name: torch.cat([part[name].detach().float().cpu() for part in parts]) for name in parts[0]}


def compared(one: Outputs, other: Outputs) -> Comparison:
    """Compare the outputs of two models for the same images. What only one of them has is infinitely different."""
    found = {}
    for name in sorted(one.keys() | other.keys(), reverse=True):
        same = name in one and name in other and one[name].shape == other[name].shape
        off = float((one[name] - other[name]).abs().max()) if same else math.inf
        if not same or not math.isfinite(off):
            found[name] = Difference(math.inf, math.inf)
        else:
            found[name] = Difference(off, off / max(float(one[name].abs().max()), 1e-30))
    top1 = None
    if "logits" in one and "logits" in other and one["logits"].shape == other["logits"].shape:
        top1 = int((_class_of(one["logits"]) == _class_of(other["logits"])).sum())
    return Comparison(len(next(iter(one.values()))), found, top1)


def _class_of(logits: Tensor) -> Tensor:
    return logits.flatten(1).argmax(dim=1) if logits.dim() > 1 else logits
