"""Evaluate checkpoints while the run trains (`evaluate.asynchronous`), one after the other."""

import logging
import time

from vimscale.checkpoint import retention
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import evaluations
from vimscale.runtime.run_folder import RunFolder, checkpoint_name, checkpoints, step_of

from ..processes.evaluator import Evaluated, Evaluator
from ..processes.rank import Event
from ..processes.signals import StopSignal
from .progress import Progress

log = logging.getLogger(__name__)

_TRIES = 2
"""How many times a checkpoint's evaluation may begin."""
_MANY = 4
"""So many checkpoints in the queue are worth a warning: they are kept until they are evaluated."""
_POLL_S = 0.1


class Evaluations:
    """The checkpoints that are due, and the evaluation that runs. Nothing here ends or delays the run's steps."""

    def __init__(self, recipe: Recipe, folder: RunFolder, evaluator: Evaluator, progress: Progress):
        self._recipe, self._folder, self._evaluator, self._progress = recipe, folder, evaluator, progress
        self._queue: list[int] = []
        self._running: int | None = None
        self._tries = 0
        """Of the first one in the queue."""
        self._warned = False
        self._resume()

    def _resume(self) -> None:
        """Queue the checkpoints that an earlier launch did not come to. Rows that ranks wrote count as evaluations."""
        there = {row["step"]: row for row in self._folder.rows("eval")}
        names = [path.name for path in checkpoints(self._folder.checkpoints)]
        for step in sorted(map(step_of, evaluations.waiting(self._folder, self._recipe.evaluate.every, names))):
            if step in there:
                evaluations.write(self._folder, step, {k: v for k, v in there[step].items() if k not in _ROW})
            else:
                self._queue.append(step)

    def heard(self, event: Event) -> None:
        """Take note of what rank 0 reports."""
        every = self._recipe.evaluate.every
        if event["kind"] == "checkpoint" and every and event["step"] % every == 0:
            self._offer(event["step"])
        if event["kind"] == "guard" and event["action"] == "rollback":
            if self._running is not None and self._running > event["to"]:
                self.pause()
            self._queue = [step for step in self._queue if step <= event["to"]]
            evaluations.forget_after(self._folder, event["to"])

    def _offer(self, step: int) -> None:
        if step in self._queue or step in evaluations.steps(self._folder):
            return
        self._queue.append(step)
        if len(self._queue) >= _MANY and not self._warned:
            self._warned = True
            self._progress.note(
                "warning",
                f"{len(self._queue)} checkpoints wait to be evaluated, and stay until they are; evaluations take longer"
                " than the steps between them: raise evaluate.every",
            )

    def tend(self, *, alone: bool = False) -> None:
        """Note an evaluation that has ended, and begin the next one. `alone`: no rank runs any more."""
        if self._running is not None and (ended := self._evaluator.poll()) is not None:
            step, self._running = self._running, None
            self._ended(step, ended)
        if self._running is None and self._queue:
            step = self._queue[0]
            self._tries += 1
            try:
                self._evaluator.start(self._folder.checkpoints / checkpoint_name(step), alone=alone)
                self._running = step
            except OSError as error:
                self._ended(step, Evaluated(None, f"no process could be started: {error.strerror}"))

    def _ended(self, step: int, ended: Evaluated) -> None:
        """Record how the evaluation of the first step in the queue ended, and take the step out unless it is tried
        again.
        """
        if ended.interrupted:
            self._tries -= 1
            return
        if ended.figures is None and ended.curable and self._tries < _TRIES:
            self._progress.note("warning", f"evaluation of step {step:,}: {ended.message}; trying once more")
            return
        self._queue, self._tries = self._queue[1:], 0
        try:
            if ended.figures is not None:
                evaluations.write(self._folder, step, ended.figures)
                self._progress.show({"kind": "eval", "step": step, **ended.figures})
                return
            evaluations.write_failure(self._folder, step, ended.message)
        except OSError as error:  # a full disk must not end the run
            self._progress.note("warning", f"{self._folder.evaluations} could not be written: {error.strerror}")
        if ended.figures is None:
            where = f"{self._folder.path}/logs/evaluator.txt"
            self._progress.note(
                "warning", f"step {step:,} is not evaluated: {ended.message}\n  training goes on; more in {where}"
            )

    def pause(self) -> None:
        """End the evaluation that runs, so that what it occupies is free; `tend` begins it again."""
        if self._running is not None:
            self._evaluator.kill()
            self._running = None
            self._tries = 0

    def close(self) -> None:
        """End the evaluation that runs; the next launch begins it again."""
        self.pause()

    def finish(self, result: dict, stop: StopSignal) -> bool:
        """Wait for what is due after the last step, write the rows that metrics.jsonl lacks and result.json. Returns
        False if a stop is requested meanwhile.

        Raises:
            RunFailed: result.json or metrics.jsonl cannot be written.
        """
        step = result["step"]
        self._offer(step)
        if self._queue:
            self._progress.note("info", f"training is done; evaluating step {', '.join(map(str, self._queue))}")
        while self._queue:
            if stop.asked:
                return False
            self.tend(alone=True)
            time.sleep(_POLL_S)

        from vimscale.tracking.trackers import Trackers
        from vimscale.training.metrics import Metrics  # imports torch

        trackers = Trackers(self._folder, self._recipe, step, "cpu")
        metrics = Metrics(self._folder, step, trackers)
        metrics.add_evaluations(step)
        metrics.close()
        trackers.close("done")
        row = evaluations.read(self._folder, step) or {}
        self._folder.finish(result | {key: value for key, value in row.items() if key not in _ROW})
        kept = self._recipe.checkpoint
        for name in retention.surplus([path.name for path in checkpoints(self._folder.checkpoints)], kept):
            try:
                retention.remove(self._folder.checkpoints / name)
            except OSError as error:
                log.warning("checkpoint %s could not be removed: %s", name, error.strerror)
        return True


_ROW = ("kind", "step", "asynchronous")
