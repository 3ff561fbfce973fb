"""The training loop: one rank's life, top to bottom."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vimscale.checkpoint.save import Saver
from vimscale.engine import optim
from vimscale.errors import RunFailed, UserError
from vimscale.guard.judge import Micro, Record
from vimscale.objectives.base import Inputs
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec
from vimscale.runtime.heartbeat import heartbeat
from vimscale.training import recovery
from vimscale.training.run import Event, Run


def train(spec: RankSpec, emit: Callable[[Event], None], stop: Callable[[], bool]) -> dict[str, Any]:
    """Train until the recipe's last step, or until some rank's `stop()` turns true; returns how it ended.

    The process group is up; the run's folder exists. Resumes from the newest intact checkpoint in it.

    Raises:
        UserError: data or checkpoints are not what the recipe needs.
        RunFailed: the loss stays bad, whatever the guard did, or a checkpoint cannot be written.
    """
    run = Run.open(spec, emit)
    try:
        result = _train(run, stop)
    except (UserError, RunFailed):  # no restart would help
        run.close("failed")
        raise
    run.close(result["status"])
    return result


def _train(run: Run, stop: Callable[[], bool]) -> dict[str, Any]:
    spec, emit = run.spec, run.emit
    recovery.resume(run)
    with torch.no_grad():
        run.objective.begin(run.engine.model, run.step, run.steps)
    agree = distributed.Agreement(spec.patience_s)
    run.saver = Saver(run.folder.checkpoints, run.recipe.checkpoint, run.recipe.name, emit, run.unevaluated)
    emit({"kind": "started", "step": run.step, "steps": run.steps, **run.describe()})
    run.open_stream()
    run.kernels.finish()

    recipe, steps = run.recipe, run.steps
    evaluates = run.val_set is not None and not recipe.evaluate.asynchronous
    first = run.step + 1
    stopping = False
    while run.step < steps and not stopping:
        probes = take_step(run)

        # ---- what all ranks agree on
        request = distributed.STOP if stop() else distributed.NOTHING
        agreed = agree(distributed.SAVE_FAILED if run.saver.failed else request)
        if agreed == distributed.SAVE_FAILED:
            heartbeat.beat("save")
            run.saver.wait()
        stopping = agreed == distributed.STOP

        # ---- what is due after this step
        step, every = run.step, recipe.evaluate.every
        last = step == steps
        saving = last or stopping or step % recipe.checkpoint.every == 0
        evaluating = evaluates and every > 0 and step % every == 0 and not (last or stopping)
        logging_now = saving or evaluating or step % recipe.log.every == 0 or step == first

        incurable = recovery.diagnose_bad_steps(run, wait=logging_now)
        if logging_now or incurable is not None:
            run.log_line(probes)
        if incurable is not None:
            recovery.roll_back(run, incurable)
            continue
        if evaluating:
            run.evaluate()
            heartbeat.beat("step")
        if saving:
            recovery.save(run, stopping=stopping)

    heartbeat.beat("save")
    agree.close()
    run.saver.close()
    finished = run.step == steps
    result: dict[str, Any] = {"status": "done" if finished else "stopped", "step": run.step, "steps": steps}
    if finished and evaluates:
        result |= run.evaluate()
    if run.metrics is not None:
        run.metrics.close()
        if finished and not recipe.evaluate.asynchronous:  # else the launcher writes it
            run.folder.finish(result)
    dist.barrier()
    return result


def take_step(run: Run) -> dict[int, dict[str, Tensor]] | None:
    """Take one optimizer step: micro-batches forward and backward, the guard's verdict, the update. Returns probes of
    the layers, from the last micro-batch, if a log line is due.
    """
    recipe, config, engine, guard = run.recipe, run.config, run.engine, run.guard
    spec, step = run.spec, run.step
    rate = optim.learning_rate(recipe.optim, step, run.steps) * guard.factor(step)
    decay = optim.weight_decay(recipe.optim, step, run.steps)
    late = step + 1 >= run.objective.late[1]
    cut = recipe.micro_batch(spec.world, step)
    draws = None
    if config.drop_path > 0:
        draws = distributed.draws(recipe.seed, step, recipe.batch_at(step), len(config.layers))
    backward = distributed.backward_parts(config, recipe.seed, step)
    probing = (step + 1) % recipe.log.every == 0
    loss: Tensor | None = None
    micros: list[Micro] = []

    def taken(part: int) -> Inputs:
        images, targets, batch = run.prefetcher.take()
        if run.pictures is not None:
            run.pictures.look(step + 1, images)
        run.meter.add(batch)
        rows = cut.rows(spec.data_rank, part)
        mine = None if draws is None else draws[rows.start : rows.stop].to(engine.device, non_blocking=True)
        micros.append(Micro(batch, mine, backward))
        return Inputs(images, targets, run.prefetcher.views(batch), mine, backward)

    parts: Iterable[Inputs] = map(taken, range(cut.accumulation))
    if run.objective.looks_ahead:
        parts = engine.look_ahead(list(parts))
    for part, inputs in enumerate(parts):
        engine.encoder.probes = {} if probing and part == cut.accumulation - 1 else None
        part_loss, figures = engine.loss(inputs)
        probes, engine.encoder.probes = engine.encoder.probes, None
        engine.backward(part_loss)
        share = part_loss.detach() / cut.accumulation if cut.accumulation > 1 else part_loss.detach()
        loss = share if loss is None else loss + share
        run.curve.add_figures(figures)
        engine.step(rate, partial(guard.judge, loss), decay=decay, late=late)
        run.prefetcher.ahead()
    applied = guard.applied
    if run.ema is not None and recipe.optim.ema is not None:
        run.ema.update((1 - optim.ema_decay(recipe.optim.ema, step)) * applied)
    run.step += 1
    with torch.no_grad():
        run.objective.after_update(engine.model, run.step, applied)
    guard.keep(Record(run.step, micros, engine.broken_gradients))
    heartbeat.beat("step", run.step)
    run.curve.add(guard.loss, rate)
    return probes
