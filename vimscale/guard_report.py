"""What a bad step was: its batch, and the first layer, weight or gradient that is not as it should be."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vimscale import run_folder
from vimscale.data.feed import Feed
from vimscale.data.training_set import TrainingSet
from vimscale.engine import Engine
from vimscale.errors import CheckpointError
from vimscale.guard import Micro, Record, Seen
from vimscale.recipe import Recipe
from vimscale.run_folder import RunFolder

log = logging.getLogger(__name__)

_KEPT = 20
"""So many reports of a run stay; each holds a batch."""
_OUTLYING = 10.0
"""So many times the largest activation of the last good batch is not normal for a layer."""
_SHOWN = 8
"""Names or samples that the readable report lists."""


# ---- writing


def write(
    folder: RunFolder,
    seen: Seen,
    record: Record,
    good: Record | None,
    *,
    engine: Engine,
    feed: Feed,
    train_set: TrainingSet,
    recipe: Recipe,
) -> tuple[Path, dict[str, Any]]:
    """Look into a bad step once more and write down what is found: (the report's folder, the report). Called by all
    ranks, and the same on each.
    """
    rank = dist.get_rank()
    before = [_forward(engine, feed, recipe, micro)[0] for micro in good.micros] if good is not None else []
    usual = {name: max(largest[name] for largest in before) for name in before[0]} if before else {}
    samples, layers = [], []
    for part, micro in enumerate(record.micros):
        largest, losses = _forward(engine, feed, recipe, micro)
        layers.append(_first_faults(largest, usual) | {"rank": rank, "part": part})
        samples += _samples(micro, losses, train_set, rank, part)
    own = {
        "layers": layers,
        "samples": samples,
        "weights": engine.broken_weights(),
        "gradients": record.broken_gradients(),
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    report = {
        "step": seen.step,
        "reason": seen.reason,
        "seen": asdict(seen),
        "compared_with_step": good.step if good is not None else None,
        "layers": [layer for each in ranks for layer in each["layers"]],
        "weights": list(dict.fromkeys(name for each in ranks for name in each["weights"])),
        "gradients": list(dict.fromkeys(name for each in ranks for name in each["gradients"])),
        "samples": [sample for each in ranks for sample in each["samples"]],
    }
    report["cause"] = cause(report)
    path = folder.guard / run_folder.checkpoint_name(seen.step)
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(record.micros), path / f"rank_{rank:05d}.safetensors")
        if rank == 0:
            (path / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            (path / "report.txt").write_text(text(report))
            for old in sorted(folder.guard.glob("step_*"))[:-_KEPT]:
                shutil.rmtree(old)
    except OSError as error:  # a full disk is no reason to end a run that can go on
        log.warning("report %s could not be written: %s", path, error)
    return path, report


@torch.no_grad()
def _forward(engine: Engine, feed: Feed, recipe: Recipe, micro: Micro) -> tuple[dict[str, float], list[float]]:
    """(each module's largest activation in the order they end, each image's loss); inf or nan where not finite."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
            floats = [t for t in tensors if t.is_floating_point() and t.numel()]
            if floats:
                found[name] = torch.stack([t.detach().abs().amax().float() for t in floats]).amax()

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in engine.module.named_modules() if name]
    try:
        images, targets = feed.prepare(micro.batch)
        logits = engine.forward(images, micro.draws, micro.backward)
    finally:
        for handle in handles:
            handle.remove()
    smoothing = recipe.objective.label_smoothing
    losses = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction="none")
    return {name: float(value) for name, value in found.items()}, losses.tolist()


def _first_faults(largest: dict[str, float], usual: dict[str, float]) -> dict[str, Any]:
    """The first layer whose activations are not finite, and the first where they are far larger than usual."""
    broken = next((name for name, value in largest.items() if not math.isfinite(value)), None)
    far = [
        (name, largest[name] / usual[name])
        for name in largest
        if math.isfinite(largest[name]) and 0 < _OUTLYING * usual.get(name, math.inf) < largest[name]
    ]
    return {"not_finite": broken, "outlying": far[0][0] if far else None, "times_usual": far[0][1] if far else None}


def _samples(micro: Micro, losses: list[float], train_set: TrainingSet, rank: int, part: int) -> list[dict[str, Any]]:
    batch = micro.batch
    return [
        {
            "rank": rank,
            "part": part,
            "key": key,
            "shard": train_set.datasets[place.source].where(place.shard),
            "sample": place.sample,
            "epoch": place.epoch,
            "position": place.position,
            "label": label,
            "loss": loss,
        }
        for key, place, label, loss in zip(batch.keys, batch.places, batch.labels.tolist(), losses, strict=True)
    ]


def _tensors(micros: list[Micro]) -> dict[str, Tensor]:
    """A rank's micro-batches as they were given to the model, by PART/NAME; images that differ in size one by one."""
    tensors: dict[str, Tensor] = {}
    for part, micro in enumerate(micros):
        batch = micro.batch
        if isinstance(batch.images, list):
            tensors |= {f"{part}/images/{i}": image for i, image in enumerate(batch.images)}
        else:
            tensors |= {f"{part}/images/{i}": image for i, image in enumerate(batch.images.unbind())}
        others = {"labels": batch.labels, "erase": batch.erase, "mix": batch.mix, "draws": micro.draws}
        tensors |= {f"{part}/{name}": tensor for name, tensor in others.items() if tensor is not None}
        if micro.backward is not None:
            tensors[f"{part}/backward"] = torch.tensor(micro.backward)
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


# ---- in words


def cause(report: dict[str, Any]) -> str:
    """What the figures say, in one sentence."""
    if report["weights"]:
        return f"weights are not finite: {_listed(report['weights'])}"
    broken = [layer for layer in report["layers"] if layer["not_finite"]]
    if broken:
        where = f"{broken[0]['not_finite']} on, on rank {_listed(sorted({layer['rank'] for layer in broken}))}"
        return f"activations are not finite from {where}; the weights are finite"
    if report["gradients"]:
        return (
            f"gradients are not finite, of {_listed(report['gradients'])}; weights and activations are, so it came from"
            " the backward pass, a device or the exchange of gradients"
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
    """The report for people."""
    seen = report["seen"]
    lines = [
        f"step {report['step']}: {report['reason']}",
        f"cause: {report['cause']}",
        "",
        f"loss           {seen['loss']:.6g}   median {seen['loss_median']:.6g}   z {seen['loss_z']:.1f}",
        f"gradient norm  {seen['grad_norm']:.6g}   median {seen['norm_median']:.6g}   z {seen['norm_z']:.1f}",
        f"bad steps in a row: {seen['row']}; the update of this one was left out",
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
    lines += ["", f"all {len(report['samples'])} samples are in report.json, their images beside it; to see them:"]
    return "\n".join([*lines, "vimscale inspect-batch RUN " + str(report["step"]), ""])


def _worst(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples, those without a finite loss first, then by loss."""
    return sorted(report["samples"], key=lambda sample: -sample["loss"] if math.isfinite(sample["loss"]) else -math.inf)


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


# ---- reading


def read(folder: RunFolder, step: int | None = None) -> tuple[Path, dict[str, Any], list[Tensor]]:
    """(folder, report, images (3, h, w) uint8 in the order of its samples) of a step, or of the newest report.

    Raises:
        CheckpointError: there is none.
    """
    there = sorted(path.parent for path in folder.guard.glob("step_*/report.json"))
    chosen = [path for path in there if step is None or path.name == run_folder.checkpoint_name(step)]
    if not chosen:
        names = ", ".join(path.name for path in there) or "none; the guard has seen no bad step"
        wanted = "no report" if step is None else f"no report of step {step}"
        raise CheckpointError(f"run {folder.path}: {wanted}; there are: {names}")
    path = chosen[-1]
    report = json.loads((path / "report.json").read_text())
    files = {rank: load_file(path / f"rank_{rank:05d}.safetensors") for rank in {s["rank"] for s in report["samples"]}}
    images, counted = [], dict[tuple[int, int], int]()
    for sample in report["samples"]:
        part = sample["rank"], sample["part"]
        number = counted[part] = counted.get(part, -1) + 1
        images.append(files[sample["rank"]][f"{sample['part']}/images/{number}"])
    return path, report, images
