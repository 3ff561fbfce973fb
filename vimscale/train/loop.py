"""The training loop: one rank's life, top to bottom."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vimscale.checkpoint import load as checkpoint
from vimscale.checkpoint import mirror, retention
from vimscale.checkpoint.load import TrainState
from vimscale.checkpoint.save import Saver
from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.prefetch import Prefetcher
from vimscale.data.training_set import TrainingSet
from vimscale.engine import optim, recompute
from vimscale.engine.deepspeed_engine import MOMENTS, Engine
from vimscale.errors import RunFailed
from vimscale.export.safetensors import starting_weights
from vimscale.guard import report as guard_report
from vimscale.guard.diagnose import examine
from vimscale.guard.judge import Guard, Micro, Record, Seen, pass_over
from vimscale.objectives import classification
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec
from vimscale.runtime.heartbeat import heartbeat
from vimscale.runtime.run_folder import RunFolder
from vimscale.train.evaluate import evaluate
from vimscale.train.metrics import Meter, Metrics

log = logging.getLogger(__name__)

Event = dict[str, Any]
"""What rank 0 tells the launcher: a kind (step, eval, checkpoint, guard, started), and the figures."""


def train(spec: RankSpec, emit: Callable[[Event], None], stop: Callable[[], bool]) -> dict[str, Any]:
    """Train until the recipe's last step, or until some rank's `stop()` turns true; returns how it ended.

    The process group is up; the run's folder exists. Resumes from the newest whole checkpoint in it.

    Raises:
        UserError: data or checkpoints are not what the recipe needs.
        RunFailed: the loss stays bad, whatever the guard did, or a checkpoint cannot be written.
    """
    recipe, rank, world = spec.recipe, spec.rank, spec.world
    device = torch.device(spec.device)
    folder = RunFolder(spec.folder)
    micro, accumulation = recipe.micro_batch(world)

    # ---- data and model

    train_set = TrainingSet.open(recipe.data)
    val_set = Dataset.open(recipe.data.val, recipe.data.cache) if recipe.data.val else None
    manifest = train_set.manifest
    steps = recipe.length(train_set.samples)
    config = recipe.model.shape(len(manifest.classes))
    torch.manual_seed(recipe.seed)  # the same weights on every rank
    heartbeat.beat("start")
    engine = Engine(config, recipe, device)
    heartbeat.beat("start")
    engine.module.recompute = recompute.levels(recipe.parallel, config, micro, device.type)

    # ---- where to start

    step = 0
    skipped: list[tuple[int, int]] = []  # see `Order`
    guard = Guard(recipe, device)
    place = mirror.open_mirror(recipe.checkpoint.mirror, recipe.name)
    newest = checkpoint.newest(folder.checkpoints, place)
    if newest is None and recipe.model.weights is not None:
        weights, notes = starting_weights(Path(recipe.model.weights), config, manifest)
        engine.load(weights)
        for line in notes if rank == 0 else ():
            log.info("model.weights: %s", line)
    ema = [fragment.weight.clone() for fragment in engine.fragments] if recipe.optim.ema else None
    if newest is not None:
        train_state = checkpoint.read_train_state(newest)
        skipped = train_set.resume(recipe, train_state.step, train_state.stream)
        guard.restore(train_state.guard)
        _restore(engine, ema, checkpoint.Reader(newest), train_state)
        step = train_state.step
        if rank == 0:
            log.info("resumed from %s", newest)
    kept = step  # the newest checkpoint's
    metrics = Metrics(folder, step, trained=step == steps) if rank == 0 else None
    agree = distributed.Agreement(spec.patience_s)
    saver = Saver(folder.checkpoints, recipe.checkpoint, recipe.name, emit)
    emit({"kind": "started", "step": step, "steps": steps})

    def evaluation() -> dict[str, float]:
        assert val_set is not None
        engine.module.eval()
        with engine.weights(ema):
            figures = evaluate(
                partial(engine.forward, backward=[config.backward_at(step)] * len(config.layers)),
                val_set,
                manifest,
                size=config.size,
                batch=micro,
                device=device,
                rank=rank,
                world=world,
                workers=recipe.data.workers,
            )
        engine.module.train()
        if metrics is not None:
            metrics.write({"kind": "eval", "step": step, **figures})
        emit({"kind": "eval", "step": step, **figures})
        meter.restart()
        return figures

    def open_prefetcher() -> tuple[Prefetcher, Meter]:
        settings: dict[str, Any] = {"rank": rank, "world": world, "steps": steps, "pin": device.type == "cuda"}
        prefetcher = Prefetcher(
            stream.training(recipe, train_set, config, start=step, skipped=skipped, **settings), manifest, device
        )
        return prefetcher, Meter(prefetcher, recipe.data.max_bad)

    def note(action: str, row: dict[str, Any], message: str) -> None:
        if metrics is not None:
            metrics.write({"kind": "guard", "action": action, **row})
        emit({"kind": "guard", "action": action, **row, "message": message})

    # ---- the loop

    prefetcher, meter = open_prefetcher()
    losses: list[torch.Tensor] = []  # of the steps since the last line, on the device
    rates: list[float] = []
    first = step + 1
    stopping = False
    while step < steps and not stopping:
        rate = optim.learning_rate(recipe.optim, step, steps) * guard.factor(step)
        global_batch = recipe.batch_at(step)
        micro = global_batch // (world * accumulation)
        draws = None
        if config.drop_path > 0:
            draws = distributed.draws(recipe.seed, step, global_batch, len(config.layers))
        backward = distributed.backward_parts(config, recipe.seed, step)
        looking = (step + 1) % recipe.log.every == 0  # into the layers, with the last micro-batch
        loss = torch.zeros((), device=device)
        micros: list[Micro] = []
        for part in range(accumulation):
            images, targets, batch = prefetcher.take()
            meter.add(batch)
            mine = None
            if draws is not None:
                at = (rank * accumulation + part) * micro
                mine = draws[at : at + micro].to(device, non_blocking=True)
            engine.module.probes = {} if looking and part == accumulation - 1 else None
            part_loss = classification.loss(engine.forward(images, mine, backward), targets, recipe.objective)
            probes, engine.module.probes = engine.module.probes, None
            engine.backward(part_loss)
            loss += part_loss.detach() / accumulation
            engine.step(rate, partial(guard.judge, loss))
            prefetcher.ahead()
            micros.append(Micro(batch, mine, backward))
        if ema is not None and recipe.optim.ema is not None:
            share = (1 - optim.ema_decay(recipe.optim.ema, step)) * guard.applied
            for average, fragment in zip(ema, engine.fragments, strict=True):
                average.lerp_(fragment.weight, share)
        step += 1
        guard.keep(Record(step, micros, engine.broken_gradients))
        heartbeat.beat("step", step)
        losses.append(guard.loss)
        rates.append(rate)
        request = distributed.STOP if stop() else distributed.NOTHING
        agreed = agree(distributed.SAVE_FAILED if saver.failed else request)
        if agreed == distributed.SAVE_FAILED:
            heartbeat.beat("save")
            saver.wait()
        stopping = agreed == distributed.STOP

        last = step == steps
        saving = last or stopping or step % recipe.checkpoint.every == 0
        every = recipe.evaluate.every
        evaluating = val_set is not None and every > 0 and step % every == 0 and not (last or stopping)
        logging_now = saving or evaluating or step % recipe.log.every == 0 or step == first
        hopeless: tuple[Seen, Path] | None = None
        for seen, record in guard.read(wait=logging_now):
            report = examine(
                folder,
                seen,
                record,
                guard.good,
                engine=engine,
                prefetcher=prefetcher,
                train_set=train_set,
                recipe=recipe,
                rollbacks=guard.rollbacks,
            )
            path = guard_report.place(folder, seen.step, guard.rollbacks)
            note(
                "skip",
                {"step": seen.step, "row": seen.row, "loss": seen.loss, "grad_norm": seen.grad_norm},
                f"step {seen.step}: {seen.reason}; its update is left out\n  {report['cause']}\n  report: {path}",
            )
            if hopeless is None and (seen.row > recipe.guard.skips or report["weights"]):
                hopeless = seen, path
        if logging_now or hopeless is not None:
            row = _log(metrics, meter, losses, rates, step, engine.grad_norm(), world)
            row["epoch"] = recipe.consumed(step) / train_set.samples
            emit({"kind": "step", "steps": steps, **row})
            if metrics is not None and probes:
                metrics.write({"kind": "layers", "step": step, **_columns(probes)})
            losses, rates = [], []
        if hopeless is not None:
            seen, path = hopeless
            heartbeat.beat("save")
            saver.wait()
            newest = checkpoint.newest(folder.checkpoints, place, regular=True)
            if newest is None or guard.rollbacks >= recipe.guard.rollbacks:
                raise RunFailed(_given_up(seen, path, newest, guard))
            train_state = checkpoint.read_train_state(newest)
            skipped = pass_over(recipe, skipped, seen.step - seen.row, seen.step)
            _restore(engine, ema, checkpoint.Reader(newest), train_state)
            guard.go_back(train_state.step, train_state.guard)
            step, losses, rates = train_state.step, [], []
            kept = step
            if rank == 0:
                retention.remove_after(newest)
            prefetcher, meter = open_prefetcher()
            if metrics is not None:
                metrics.close()
                metrics = Metrics(folder, step)
            first_bad = seen.step - seen.row + 1
            note(
                "rollback",
                {"step": seen.step, "first": first_bad, "to": step, "rollbacks": guard.rollbacks, "report": str(path)},
                f"going back to step {step}, and past the data of steps {first_bad} to {seen.step}"
                f" ({guard.rollbacks} of {recipe.guard.rollbacks} times)",
            )
            heartbeat.beat("step")
            continue
        if evaluating:
            evaluation()
        at, wanted = step, saving
        if saving and guard.row and not last:
            # bad steps may be the weights' fault, and what is saved, the run may go back to; a run that is stopped
            # saves what is still the state of the step before them, and meets them again
            at = step - guard.row
            saving = stopping and at > kept
        if saving and _broken(engine):
            if last:
                raise RunFailed(f"step {step}: weights are not finite after the last update; lower optim.lr")
            saving = False
        if wanted and not (saving and at == step):
            log.warning("step %d: no checkpoint of it, because the guard has just seen a bad step", step)
        if saving:
            heartbeat.beat("save")
            train_state = TrainState(
                step=at,
                stream=train_set.state(recipe, at, skipped),
                guard=guard.state(),
                updates=engine.updates,
                shapes=engine.shapes,
                world=world,
                zero=recipe.parallel.zero,
                ema=ema is not None,
                training_set=train_set.about,
                asked=not last and at % recipe.checkpoint.every != 0,
            )
            saver.save(_state(engine, ema), train_state)
            kept = at
            meter.restart()
        if saving or evaluating:
            heartbeat.beat("step")

    heartbeat.beat("save")
    agree.close()
    saver.close()
    finished = step == steps
    result: dict[str, Any] = {"status": "done" if finished else "stopped", "step": step, "steps": steps}
    if finished and val_set is not None:
        result |= evaluation()
    if rank == 0:
        assert metrics is not None
        metrics.close()
        if finished:
            _finish(folder, result)
    dist.barrier()
    return result


def _finish(folder: RunFolder, result: dict[str, Any]) -> None:
    try:
        folder.finish(result)
    except OSError as error:
        raise RunFailed(
            f"result.json could not be written: {error.strerror}; make room under {folder.path}, and the same command"
            " writes it; the last checkpoint is complete"
        ) from None


def _log(
    metrics: Metrics | None,
    meter: Meter,
    losses: list[torch.Tensor],
    rates: list[float],
    step: int,
    grad_norm: float,
    world: int,
) -> dict[str, Any]:
    """Bring the losses of all steps since the last line to the host and write them down."""
    first = step - len(losses) + 1
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": first + i, "loss": loss, "lr": rate}
        for i, (loss, rate) in enumerate(zip(torch.stack(losses).tolist(), rates, strict=True))
    ]
    rows[-1] |= {"grad_norm": grad_norm, **meter.read(world)}
    if metrics is not None:
        for row in rows:
            metrics.write(row)
    return {key: value for key, value in rows[-1].items() if key != "kind"}


def _broken(engine: Engine) -> bool:
    """Whether weights of any rank are not finite, the same on all of them. Waits for the device."""
    number = torch.tensor(float(len(engine.broken_weights())), device=engine.device)
    return bool(distributed.total(number))


def _given_up(seen: Seen, report: Path, newest: Path | None, guard: Guard) -> str:
    """Why the guard ends the run, and what may help."""
    tried = f"after going back {guard.rollbacks} times" if newest else "and there is no checkpoint to go back to"
    return (
        f"step {seen.step}: {seen.reason}, {tried} (guard.skips, guard.rollbacks); what was seen is in"
        f" {report}/report.txt. Lower optim.lr, raise optim.warmup or set optim.clip; nothing was saved since the"
        " last checkpoint"
    )


def _columns(probes: dict[int, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Probes of the layers as one list a quantity; None where a layer has none of it (attention has no states)."""
    names = dict.fromkeys(name for probe in probes.values() for name in probe)
    return {
        "layer": list(probes),
        **{name: [float(probe[name]) if name in probe else None for probe in probes.values()] for name in names},
    }


def _state(engine: Engine, ema: list[torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What this rank has to save, by the names that `checkpoint.Reader` knows."""
    tensors = {}
    for i, fragment in enumerate(engine.fragments):
        if not fragment.owned:
            continue
        kinds = {"weight": fragment.weight} | {key: engine.moment(fragment, key) for key in MOMENTS}
        if ema is not None:
            kinds["ema"] = ema[i]
        for kind, tensor in kinds.items():
            if tensor is not None:
                tensors[checkpoint.piece_key(kind, fragment.name, fragment.start)] = tensor
    return tensors


def _restore(
    engine: Engine, ema: list[torch.Tensor] | None, reader: checkpoint.Reader, train_state: TrainState
) -> None:
    engine.restore_moments(train_state.updates)
    for i, fragment in enumerate(engine.fragments):
        kinds: dict[str, torch.Tensor | None] = {"weight": fragment.weight}
        kinds |= {key: engine.moment(fragment, key) for key in MOMENTS}
        if ema is not None:
            kinds["ema"] = ema[i]
        for kind, tensor in kinds.items():
            assert tensor is not None
            tensor.copy_(reader.read(kind, fragment.name, fragment.start, fragment.numel))
        heartbeat.beat(heartbeat.doing)
    engine.publish([fragment.weight for fragment in engine.fragments])
