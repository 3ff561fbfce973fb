"""Diagnose a bad step: run its batch through the model again, and find the first layer that is not as usual."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from vimscale.data.prefetch import Prefetcher
from vimscale.data.training_set import TrainingSet
from vimscale.engine.deepspeed_engine import Engine
from vimscale.guard import report as guard_report
from vimscale.guard.judge import Micro, Record, Seen
from vimscale.model.tiles import Bag
from vimscale.runtime import distributed
from vimscale.runtime.run_folder import RunFolder

log = logging.getLogger(__name__)

_OUTLYING = 10.0
"""A layer is an outlier from this many times its largest activation in the last good batch."""


def diagnose(
    folder: RunFolder,
    seen: Seen,
    record: Record,
    good: Record | None,
    *,
    engine: Engine,
    prefetcher: Prefetcher,
    train_set: TrainingSet,
    rollbacks: int,
    context: int,
) -> dict[str, Any]:
    """Find out what is wrong with a bad step and write a report; returns it, the same on every rank. All ranks call
    this. Of `context` ranks that share images, each reports its layers, and the first one the images.
    """
    rank = dist.get_rank()
    before = [_forward(engine, prefetcher, micro)[0] for micro in good.micros] if good is not None else []
    usual = {name: max(largest[name] for largest in before) for name in before[0]} if before else {}
    counted = distributed.counts_images(context)
    samples, layers = [], []
    for part, micro in enumerate(record.micros):
        largest, losses = _forward(engine, prefetcher, micro)
        layers.append(_first_faults(largest, usual) | {"rank": rank, "part": part})
        samples += _samples(micro, losses, train_set, rank, part) if counted else []
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
        "rollbacks": rollbacks,
        "reason": seen.reason,
        "seen": asdict(seen),
        "compared_with_step": good.step if good is not None else None,
        "layers": [layer for each in ranks for layer in each["layers"]],
        "weights": list(dict.fromkeys(name for each in ranks for name in each["weights"])),
        "gradients": list(dict.fromkeys(name for each in ranks for name in each["gradients"])),
        "samples": [sample for each in ranks for sample in each["samples"]],
    }
    report["cause"] = guard_report.cause(report)
    try:
        if counted:
            guard_report.save(folder, report, _tensors(record.micros), rank)
    except (OSError, SafetensorError) as error:  # a full disk must not end a run that can continue
        log.warning("the report of step %d could not be written: %s", seen.step, error)
    return report


@torch.no_grad()
def _forward(engine: Engine, prefetcher: Prefetcher, micro: Micro) -> tuple[dict[str, float], list[float]]:
    """(the largest activation of each module, in the order in which they return; the loss of each image)."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
            floats = [t for t in tensors if t.is_floating_point() and t.numel()]
            if floats:
                found[name] = torch.stack([t.detach().abs().amax().float() for t in floats]).amax()

        return look

    modules = [*engine.encoder.named_modules(), *engine.model.added.named_modules(prefix="objective")]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules if name]
    try:
        losses = engine.ask("loss_per_sample", micro.inputs(prefetcher))
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(value) for name, value in found.items()}, losses.tolist()


def _first_faults(largest: dict[str, float], usual: dict[str, float]) -> dict[str, Any]:
    """The first layer whose activations are not finite, and the first whose activations are far larger than usual."""
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
            "shard": train_set.datasets[ref.source].where(ref.shard),
            "sample": ref.sample,
            "epoch": ref.epoch,
            "position": ref.position,
            "label": label,
            "class": train_set.datasets[ref.source].manifest.class_name(label),
            "loss": loss,
        }
        for key, ref, label, loss in zip(batch.keys, batch.refs, batch.labels.tolist(), losses, strict=True)
    ]


def _tensors(micros: list[Micro]) -> dict[str, Tensor]:
    """A rank's micro-batches as the model got them, named PART/NAME; each image separately, as sizes may differ."""
    tensors: dict[str, Tensor] = {}
    for part, micro in enumerate(micros):
        batch = micro.batch
        for i, image in enumerate(batch.images):
            if isinstance(image, Bag):
                tensors |= {f"{part}/images/{i}": image.tiles, f"{part}/at/{i}": image.at}
            else:
                tensors[f"{part}/images/{i}"] = image
        others = {"labels": batch.labels, "erase": batch.erase, "mix": batch.mix, "draws": micro.draws}
        others |= {f"views/{name}": view for name, view in batch.views.items()}
        tensors |= {f"{part}/{name}": tensor for name, tensor in others.items() if tensor is not None}
        if micro.backward is not None:
            tensors[f"{part}/backward"] = torch.tensor(micro.backward)
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
