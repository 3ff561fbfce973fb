"""A sweep's trials under Ray Tune: which run at once, which are given up early (ASHA), and how they are stopped.

Tune decides and reserves; each trial is a run of its own, in a process of its own, whose figures are read from its
folder. So nothing is lost with Tune: what it has to know of earlier trials is told it again from their folders.
To be imported once a `Ray` is there, which has to settle a few things before Ray's own import.
"""

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vimscale.errors import LaunchError, RunFailed

from ..processes.ray_connection import Ray
from ..processes.signals import StopSignal
from . import trials, unattended
from .trials import By, Trial

_LOOK_S = 0.5
"""How often a trial's folder is read."""
_SCRATCH = ".tune"
"""What Tune writes, of no further use."""
_END_S = 300
"""How long a trial may take to save and end."""


@dataclass(frozen=True)
class _Order:
    """What a trial is told."""

    trial: Trial
    steps: int
    by: By
    every: int
    workers: int
    threads: int | None
    cwd: Path
    first: Trial
    """The seed of its setting that is judged for all of them; most often itself."""


class _Run(tune.Trainable):
    """One trial, as Tune sees it: every `step` is a figure to judge it by."""

    def setup(self, config: dict[str, Any], orders: dict[str, _Order]) -> None:
        self._order = order = orders[config["name"]]
        self._trial, self._told = order.trial, 0
        self._process = unattended.start(self._trial.folder.path, order.workers, order.threads, order.cwd)

    def step(self) -> dict[str, Any]:
        order = self._order
        while True:
            code = self._process.poll()  # before the folder is read: what it wrote last is there then
            known = trials.figures(trials.rows(self._trial.folder), order.by, order.every)
            # the last step's figure comes when all is done, or the trial would be judged and ended before it is
            ripe = [figure for figure in known[self._told :] if figure[0] < order.steps]
            if ripe:
                self._told += 1
                return {"at": ripe[0][0], "figure": ripe[0][1]}
            if code is not None:
                if code != 0:
                    said = unattended.last_words(self._trial.folder.path)
                    raise RunFailed(f"trial {self._trial.name}: {said or f'ended with code {code}'}")
                one = trials.outcome(self._trial, order.by, order.every)
                return {"at": one.step, "figure": one.value, "done": True}
            time.sleep(_LOOK_S)

    def cleanup(self) -> None:
        """Have it save a checkpoint and end."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


class _Asha(ASHAScheduler):
    """ASHA over settings: the first seed of each is judged, and the others go its way. Knows what became of trials in
    earlier launches, and writes down which ones it gives up.
    """

    def __init__(self, past: list[Trial], orders: dict[str, _Order], keep: int):
        order = next(iter(orders.values()))
        steps = max(order.steps for order in orders.values())
        super().__init__(
            time_attr="at",
            metric="figure",
            mode="max" if order.by == "top1" else "min",
            grace_period=order.every,
            max_t=max(steps, order.every),
            reduction_factor=keep,
            stop_last_trials=False,
        )
        self._past, self._orders, self._by, self._every = past, orders, order.by, order.every

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        past, self._past = self._past, []
        for one in past:
            ghost = SimpleNamespace(trial_id=one.name)
            super().on_trial_add(tune_controller, ghost)
            for at, figure in trials.figures(trials.rows(one.folder), self._by, self._every):
                self.on_trial_result(tune_controller, ghost, {"at": at, "figure": figure})
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        if isinstance(trial, SimpleNamespace):
            return super().on_trial_result(tune_controller, trial, result)
        order = self._orders[trial.config["name"]]
        if order.trial is order.first:
            decision = super().on_trial_result(tune_controller, trial, result)
        else:
            decision = TrialScheduler.STOP if order.first.stopped else TrialScheduler.CONTINUE
        if decision == TrialScheduler.STOP:
            order.trial.stop(result["at"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        order = self._orders[trial.config["name"]]
        if order.trial is order.first:
            super().on_trial_complete(tune_controller, trial, result)


class _Wish(tune.Stopper):
    """Ends all trials once the user asks for it."""

    def __init__(self, stop: StopSignal):
        self._stop = stop

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.asked


class _Told(tune.Callback):
    """Says what happens."""

    def __reduce__(self) -> tuple:
        return object, ()  # Tune pickles its callbacks for a restoring that is not ours

    def __init__(self, say: Callable[[str], None], orders: dict[str, _Order]):
        self._say, self._orders = say, orders

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._say(f"{trial}: started")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        order = self._orders[trial.config["name"]]
        given_up = ": given up" if order.trial.stopped else ""
        figure = f"top-1 {result['figure']:.2%}" if order.by == "top1" else f"loss {result['figure']:.4f}"
        self._say(f"{trial}: step {result['at']:,} of {order.steps:,}, {figure}{given_up}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        said = unattended.last_words(self._orders[trial.config["name"]].trial.folder.path)
        self._say(f"{trial}: failed: {said or 'its process ended'}")


def check_room(workers: int) -> None:
    """Whether some node of Ray has devices for all ranks of a trial; Tune would wait for one for ever.

    Raises:
        LaunchError: none has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if any("GPU" in node for node in nodes) else "CPU"
    most = int(max(node.get(kind, 0) for node in nodes))
    if workers > most:
        rule = f"a trial's ranks share a machine and take one {kind} each, and the largest here has {most}"
        raise LaunchError(f"--workers {workers}: {rule}; use 1 to {most}")


def run(
    connection: Ray,
    open_: list[Trial],
    past: list[Trial],
    *,
    firsts: dict[str, Trial],
    folder: Path,
    steps: Callable[[Trial], int],
    by: By,
    every: int,
    keep: int | None,
    workers: int,
    stop: StopSignal,
    say: Callable[[str], None],
) -> None:
    """Run the trials that are open, as many at once as there is room for. `keep`: one setting in so many goes on past
    every rung of ASHA, at `every`, `every` x keep, ... steps; None lets all of them finish. `firsts`: by trial, the one
    that is judged for it.
    """
    # Tune's own reports, files and handling of signals are in the way of ours
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1", RAY_AIR_NEW_OUTPUT="0")
    os.environ.update(TUNE_PRINT_ALL_TRIAL_ERRORS="0", TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S="0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
    _, gpus = connection.resources()
    threads = None if gpus else 1
    orders = {
        one.name: _Order(one, steps(one), by, every, workers, threads, Path.cwd(), firsts[one.name]) for one in open_
    }
    judged = [one for one in past if firsts[one.name] is one]
    resources = {"cpu": workers, "gpu": workers if gpus else 0}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_Run, orders=orders), resources),
        param_space={"name": tune.grid_search(list(orders))},
        tune_config=tune.TuneConfig(
            scheduler=_Asha(judged, orders, keep) if keep is not None else FIFOScheduler(),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=_SCRATCH,
            storage_path=str(folder),
            verbose=0,
            stop=_Wish(stop),
            callbacks=[_Told(say, orders)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)


def _name(trial: Any) -> str:
    return trial.config["name"]
