"""Checkpoints as the loop uses them: resume from one, save one unless bad steps forbid it, roll back to one."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vimscale.checkpoint import load as checkpoint
from vimscale.checkpoint import retention
from vimscale.checkpoint.load import TrainState
from vimscale.engine.deepspeed_engine import MOMENTS, Average, Engine
from vimscale.errors import RunFailed
from vimscale.export.safetensors import groups, starting_weights
from vimscale.guard import report as guard_report
from vimscale.guard.diagnose import diagnose
from vimscale.guard.judge import Guard, Seen, pass_over
from vimscale.runtime import distributed, evaluations
from vimscale.runtime.heartbeat import heartbeat
from vimscale.tracking.trackers import Trackers
from vimscale.training.metrics import Curve, Metrics
from vimscale.training.pictures import Pictures
from vimscale.training.run import Run

log = logging.getLogger(__name__)


def resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run's folder or its mirror; else start at step 0, from `model.weights`
    if the recipe names some.

    Raises:
        CheckpointError: the checkpoints or the weights cannot be used.
        DataError: the order of the data is not the one that the checkpoint was trained on.
    """
    recipe, rank, engine = run.recipe, run.spec.rank, run.engine
    newest = checkpoint.newest(run.folder.checkpoints, run.mirror)
    if newest is None and recipe.model.weights is not None:
        folder, model = Path(recipe.model.weights), recipe.model
        weights, notes = starting_weights(folder, run.config, run.train_set.manifest, model.grow, model.change)
        engine.load(weights)
        for line in [*notes, *groups(folder, run.config, weights)] if rank == 0 else ():
            log.info("model.weights: %s", line)
    run.ema = Average(engine.fragments) if recipe.optim.ema else None
    if newest is not None:
        state = checkpoint.read_train_state(newest)
        run.skipped = run.train_set.resume(recipe, state.step, state.stream)
        run.guard.restore(state.guard)
        _restore(run, newest, state)
        if rank == 0:
            log.info("resumed from %s", newest)
    if rank == 0:
        device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        trackers = Trackers(run.folder, recipe, run.step, device)
        if recipe.log.images:
            manifest = run.train_set.manifest
            run.pictures = Pictures(run.folder, trackers, manifest.mean, manifest.std)
        run.metrics = Metrics(run.folder, run.step, trackers, trained=run.step == run.steps)


@dataclass(frozen=True)
class Incurable:
    """A bad step that leaving out updates does not cure."""

    seen: Seen
    report: Path


def diagnose_bad_steps(run: Run, *, wait: bool) -> Incurable | None:
    """Diagnose and report the bad steps whose verdict has come; `wait` for the last step's too. Returns the first one
    that ends a row of too many, or whose weights are not finite. The same on all ranks.
    """
    guard = run.guard
    found: Incurable | None = None
    for seen, record in guard.read(wait=wait):
        report = diagnose(
            run.folder,
            seen,
            record,
            guard.good,
            engine=run.engine,
            prefetcher=run.prefetcher,
            train_set=run.train_set,
            rollbacks=guard.rollbacks,
            context=run.spec.context,
        )
        path = guard_report.folder_of(run.folder, seen.step, guard.rollbacks)
        if run.pictures is not None:
            run.pictures.add_bad(seen.step)
        run.log_guard(
            "skip",
            {"step": seen.step, "row": seen.row, "loss": seen.loss, "grad_norm": seen.grad_norm},
            f"step {seen.step}: {seen.reason}; its update is left out\n  {report['cause']}\n  report: {path}",
        )
        if found is None and (seen.row > run.recipe.guard.skips or report["weights"]):
            found = Incurable(seen, path)
    return found


def roll_back(run: Run, bad: Incurable) -> None:
    """Return to the last regular checkpoint, and pass over the data of the bad steps.

    Raises:
        RunFailed: there is no checkpoint, or the run has rolled back as often as it may.
    """
    recipe, guard, seen = run.recipe, run.guard, bad.seen
    heartbeat.beat("save")
    run.saver.wait()
    newest = checkpoint.newest(run.folder.checkpoints, run.mirror, regular=True)
    if newest is None or guard.rollbacks >= recipe.guard.rollbacks:
        raise RunFailed(_given_up(bad, newest, guard))
    state = checkpoint.read_train_state(newest)
    run.skipped = pass_over(recipe, run.skipped, seen.step - seen.row, seen.step)
    _restore(run, newest, state)
    guard.go_back(state.step, state.guard)
    run.curve = Curve()
    if run.spec.rank == 0:
        retention.remove_after(newest)
        evaluations.forget_after(run.folder, run.step)
    run.open_stream()
    if run.metrics is not None:
        run.metrics.go_back(run.step)
    first = seen.step - seen.row + 1
    run.log_guard(
        "rollback",
        {"step": seen.step, "first": first, "to": run.step, "rollbacks": guard.rollbacks, "report": str(bad.report)},
        f"rolling back to step {run.step}, and skipping the data of steps {first} to {seen.step}"
        f" (rollback {guard.rollbacks} of {recipe.guard.rollbacks})",
    )
    heartbeat.beat("step")


def _given_up(bad: Incurable, newest: Path | None, guard: Guard) -> str:
    """Why the guard ends the run, and what may help."""
    tried = f"after {guard.rollbacks} rollbacks" if newest else "and there is no checkpoint to roll back to"
    return (
        f"step {bad.seen.step}: {bad.seen.reason}, {tried} (guard.skips, guard.rollbacks); what was seen is in"
        f" {bad.report}/report.txt. Lower optim.lr, raise optim.warmup or set optim.clip; nothing was saved since the"
        " last checkpoint"
    )


def save(run: Run, *, stopping: bool) -> None:
    """Save the current step, unless the guard has just seen a bad one: the weights may be at fault, and the run may
    roll back to what is saved. A run that stops after bad steps saves the state before them, which is still there
    because their updates were left out; it meets them again when it resumes.

    Raises:
        RunFailed: weights are not finite after the last update, or an earlier save failed.
    """
    last, at, row = run.step == run.steps, run.step, run.guard.row
    allowed = True
    if row and not last:
        at = run.step - row
        allowed = stopping and at > run.saved
    if allowed and _has_broken_weights(run.engine):
        if last:
            raise RunFailed(f"step {run.step}: weights are not finite after the last update; lower optim.lr")
        allowed = False
    if not (allowed and at == run.step):
        log.warning("step %d: no checkpoint of it, because the guard has just seen a bad step", run.step)
    if not allowed:
        return
    heartbeat.beat("save")
    recipe, engine = run.recipe, run.engine
    state = TrainState(
        step=at,
        stream=run.train_set.state(recipe, at, run.skipped),
        guard=run.guard.state(),
        updates=engine.updates,
        late_updates=engine.late_updates,
        shapes=engine.shapes | {name: list(t.shape) for name, t in engine.model.buffers_to_save().items()},
        world=run.spec.world,
        zero=recipe.parallel.zero,
        ema=run.ema is not None,
        training_set=run.train_set.about,
        asked=not last and at % recipe.checkpoint.every != 0,
    )
    run.saver.save(_tensors(run), state)
    run.saved = at
    run.meter.restart()
    heartbeat.beat("step")


def _has_broken_weights(engine: Engine) -> bool:
    """Whether weights of any rank are not finite, the same on all of them. Waits for the device."""
    number = torch.tensor(float(len(engine.broken_weights())), device=engine.device)
    return bool(distributed.total(number))


def _tensors(run: Run) -> dict[str, Tensor]:
    """What this rank has to save, by the names that `checkpoint.Reader` knows."""
    tensors = {}
    for i, fragment in enumerate(run.engine.fragments):
        if not fragment.owned:
            continue
        kinds = {"weight": fragment.weight} | {key: run.engine.moment(fragment, key) for key in MOMENTS}
        if run.ema is not None:
            kinds["ema"] = run.ema.fragments[i]
        for kind, tensor in kinds.items():
            if tensor is not None:
                tensors[checkpoint.piece_key(kind, fragment.name, fragment.start)] = tensor
    for name, buffer in run.engine.model.buffers_to_save().items() if run.spec.rank == 0 else ():
        tensors[checkpoint.piece_key(checkpoint.BUFFER, name, 0)] = buffer.reshape(-1)
    return tensors


def _restore(run: Run, folder: Path, state: TrainState) -> None:
    """Make the engine, the moving average and the position those of a checkpoint."""
    engine, reader = run.engine, checkpoint.Reader(folder)
    engine.restore_moments(state.updates, state.late_updates)
    for i, fragment in enumerate(engine.fragments):
        kinds: dict[str, Tensor | None] = {"weight": fragment.weight}
        kinds |= {key: engine.moment(fragment, key) for key in MOMENTS}
        if run.ema is not None:
            kinds["ema"] = run.ema.fragments[i]
        for kind, tensor in kinds.items():
            if tensor is not None:
                of = "weight" if kind == "ema" and not state.ema else kind  # a fork may begin to keep an average
                tensor.copy_(reader.read(of, fragment.name, fragment.start, fragment.numel))
        heartbeat.beat(heartbeat.doing)
    for name, buffer in engine.model.buffers_to_save().items():
        buffer.copy_(reader.read(checkpoint.BUFFER, name, 0, buffer.numel()).view(buffer.shape))
    engine.publish([fragment.weight for fragment in engine.fragments])
    run.step = run.saved = state.step
