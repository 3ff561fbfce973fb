"""Reports of bad steps: word them, write them, read them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimscale.data.images.bags import overview
from vimscale.errors import CheckpointError, shortened
from vimscale.model.tiles import Bag
from vimscale.runtime import run_folder
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import files, untrusted

_KEPT = 20
"""Reports that a run keeps; each holds a batch."""
_SHOWN = 8
"""Names or samples that report.txt lists."""


# ---- in words


def cause(report: dict[str, Any]) -> str:
    """The likely cause, in one sentence."""
    if report["weights"]:
        return f"weights are not finite: {_listed(report['weights'])}"
    broken = [layer for layer in report["layers"] if layer["not_finite"]]
    if broken:
        where = f"{broken[0]['not_finite']} on, on rank {_listed(sorted({layer['rank'] for layer in broken}))}"
        return f"activations are not finite from {where}; the weights are finite"
    if report["gradients"]:
        return (
            f"gradients are not finite, of {_listed(report['gradients'])}; weights and activations are finite, so the"
            " backward pass, a device or the exchange of gradients is at fault"
        )
    far = [layer for layer in report["layers"] if layer["outlying"]]
    worst = _worst(report)[0]
    sample = f"the largest loss is {worst['loss']:.4g}, of sample {worst['key']} (label {worst['label']})"
    if far:
        first = far[0]
        return (
            f"activations are {first['times_usual']:.3g} times as large as in step {report['compared_with_step']} from"
            f" {first['outlying']} on, on rank {first['rank']}; {sample}"
        )
    return f"weights and activations are as usual; {sample}"


def text(report: dict[str, Any]) -> str:
    """report.txt."""
    seen = report["seen"]
    lines = [
        f"step {report['step']}: {report['reason']}",
        f"cause: {report['cause']}",
        "",
        f"loss           {seen['loss']:.6g}   {_usual(seen['loss_median'], seen['loss_z'])}",
        f"gradient norm  {seen['grad_norm']:.6g}   {_usual(seen['norm_median'], seen['norm_z'])}",
        f"bad steps in a row: {seen['row']}; this step's update was left out",
        "",
        f"weights that are not finite:    {_listed(report['weights']) or 'none'}",
        f"gradients that are not finite:  {_listed(report['gradients']) or 'none seen'}",
        "",
        "rank  micro-batch  first layer not finite          first layer far from usual",
    ]
    for layer in report["layers"]:
        far = f"{layer['outlying']} ({layer['times_usual']:.3g} times)" if layer["outlying"] else "-"
        lines.append(f"{layer['rank']:4}  {layer['part']:11}  {layer['not_finite'] or '-':30}  {far}")
    lines += ["", "samples of the largest loss:", "rank  loss        label  key, and where it is"]
    for sample in _worst(report)[:_SHOWN]:
        where = f"{sample['key']}  {sample['shard']} sample {sample['sample']}"
        lines.append(f"{sample['rank']:4}  {sample['loss']:<10.4g}  {sample['label']:5}  {where}")
    lines += ["", f"all {len(report['samples'])} samples are in report.json, their images next to it; to see them:"]
    return "\n".join([*lines, "vimscale inspect-batch RUN " + str(report["step"]), ""])


def _usual(median: float, z: float) -> str:
    return "guard.window is not full yet" if math.isnan(median) else f"median {median:.6g}   z {z:.1f}"


def _worst(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples: those without a finite loss first, then from the largest loss to the smallest."""
    return sorted(report["samples"], key=lambda sample: -sample["loss"] if math.isfinite(sample["loss"]) else -math.inf)


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


# ---- on disk


def save(folder: RunFolder, report: dict[str, Any], tensors: dict[str, Tensor], rank: int) -> None:
    """Write this rank's tensors, named PART/images/NUMBER and so on; rank 0 also writes the report.

    Raises:
        OSError: a file cannot be written.
    """
    path = folder_of(folder, report["step"], report["rollbacks"])
    path.mkdir(parents=True, exist_ok=True)
    files.save_tensors(path / f"rank_{rank:05d}.safetensors", tensors)
    if rank == 0:
        (path / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (path / "report.txt").write_text(text(report))
        for old in sorted(folder.guard.glob("step_*"))[:-_KEPT]:
            shutil.rmtree(old)


def folder_of(folder: RunFolder, step: int, rollbacks: int) -> Path:
    """The folder of a step's report. A step that comes again after a rollback has another one."""
    name = run_folder.checkpoint_name(step)
    return folder.guard / (f"{name}_{rollbacks + 1}" if rollbacks else name)


def read(folder: RunFolder, step: int | None = None) -> tuple[Path, dict[str, Any], list[Tensor]]:
    """(folder, report, images (3, h, w) uint8 in the order of its samples) of the newest report of `step`; default: of
    the newest report. Of a bag of tiles, the image is an overview.

    Raises:
        CheckpointError: there is no such report, or it cannot be read.
    """
    there = sorted(path.parent for path in folder.guard.glob("step_*/report.json"))
    chosen = [path for path in there if step is None or path.name.startswith(run_folder.checkpoint_name(step))]
    if not chosen:
        names = ", ".join(path.name for path in there) or "none; the guard has seen no bad step"
        wanted = "no report" if step is None else f"no report of step {step}"
        raise CheckpointError(f"run {folder.path}: {wanted}; there are: {names}")
    path = chosen[-1]
    try:
        return path, *_read(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"report {path} cannot be read: {shortened(repr(error))}; remove it") from None


def _read(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    report = untrusted.loads(untrusted.read(path / "report.json"), finite=False)
    files = {rank: load_file(path / f"rank_{rank:05d}.safetensors") for rank in {s["rank"] for s in report["samples"]}}
    images, counted = [], dict[tuple[int, int], int]()
    for sample in report["samples"]:
        part = sample["rank"], sample["part"]
        number = counted[part] = counted.get(part, -1) + 1
        tensors = files[sample["rank"]]
        image = tensors[f"{sample['part']}/images/{number}"]
        images.append(image if image.ndim == 3 else overview(Bag(image, tensors[f"{sample['part']}/at/{number}"])))
    return report, images
