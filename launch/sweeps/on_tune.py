"""A sweep's trials under Ray Tune: which run at the same time, which are given up early (ASHA), and how they stop.

Tune schedules trials and reserves devices. Each trial is a separate run in a separate process, and its figures are read
from its run folder. So a lost Tune loses nothing: earlier trials are replayed to it from their folders.
Import this after a `Ray` exists, which sets things up before Ray's own import.
"""

import logging
import os
import shutil
import signal
import subprocess
import threading
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
from ..processes.signals import Stopped, StopSignal
from . import trials, unattended
from .trials import By, Trial

_POLL_S = 0.5
"""Seconds between two readings of a trial's folder."""
_SCRATCH = ".tune"
"""Folder of Tune's own files, removed at the end."""
_END_S = 300
"""Seconds that a trial may take to save and exit."""


@dataclass(frozen=True)
class _Job:
    """What a trial's process and its scheduler need to know."""

    trial: Trial
    steps: int
    by: By
    every: int
    workers: int
    threads: int | None
    cwd: Path
    first: Trial
    """The trial that is judged for all seeds of its setting; often this one."""


class _Run(tune.Trainable):
    """One trial, as Tune sees it: each `step` returns one figure to judge it by."""

    def setup(self, config: dict[str, Any], jobs: dict[str, _Job]) -> None:
        self._job = job = jobs[config["name"]]
        self._trial, self._reported = job.trial, 0
        self._process = unattended.start(self._trial.folder.path, job.workers, job.threads, job.cwd)

    def step(self) -> dict[str, Any]:
        job = self._job
        while True:
            code = self._process.poll()  # poll before reading the folder, so that the last rows are not missed
            known = trials.figures(self._trial.folder.rows(), job.by, job.every)
            # hold the last step's figure back until the process has ended, or Tune would end the trial too early
            new = [figure for figure in known[self._reported :] if figure[0] < job.steps]
            if new:
                self._reported += 1
                return {"at": new[0][0], "figure": new[0][1]}
            if code is not None:
                if code != 0:
                    error = unattended.last_error(self._trial.folder.path)
                    raise RunFailed(f"trial {self._trial.name}: {error or f'ended with code {code}'}")
                one = trials.outcome(self._trial, job.by, job.every)
                return {"at": one.step, "figure": one.value, "done": True}
            time.sleep(_POLL_S)

    def cleanup(self) -> None:
        """Make the trial save a checkpoint and exit."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


class _Asha(ASHAScheduler):
    """ASHA over settings: it judges the first seed of each, and the other seeds follow. It replays the trials of
    earlier launches, and records which trials it gives up.
    """

    def __init__(self, past: list[Trial], jobs: dict[str, _Job], keep: int):
        job = next(iter(jobs.values()))
        steps = max(job.steps for job in jobs.values())
        super().__init__(
            time_attr="at",
            metric="figure",
            mode="max" if job.by == "top1" else "min",
            grace_period=job.every,
            max_t=max(steps, job.every),
            reduction_factor=keep,
            stop_last_trials=False,
        )
        self._past, self._jobs, self._by, self._every = past, jobs, job.by, job.every

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        past, self._past = self._past, []
        for one in past:
            stand_in = SimpleNamespace(trial_id=one.name)
            super().on_trial_add(tune_controller, stand_in)
            for at, figure in trials.figures(one.folder.rows(), self._by, self._every):
                self.on_trial_result(tune_controller, stand_in, {"at": at, "figure": figure})
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        if isinstance(trial, SimpleNamespace):
            return super().on_trial_result(tune_controller, trial, result)
        job = self._jobs[trial.config["name"]]
        if job.trial is job.first:
            decision = super().on_trial_result(tune_controller, trial, result)
        else:
            decision = TrialScheduler.STOP if job.first.stopped else TrialScheduler.CONTINUE
        if decision == TrialScheduler.STOP:
            job.trial.stop(result["at"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        job = self._jobs[trial.config["name"]]
        if job.trial is job.first:
            super().on_trial_complete(tune_controller, trial, result)


class _StopRequest(tune.Stopper):
    """Ends all trials once the user asks for a stop."""

    def __init__(self, stop: StopSignal):
        self._stop = stop

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.asked


class _Reporter(tune.Callback):
    """Reports what happens to trials."""

    def __reduce__(self) -> tuple:
        return object, ()  # Tune pickles its callbacks for its own way to resume, which is not used here

    def __init__(self, say: Callable[[str], None], jobs: dict[str, _Job]):
        self._say, self._jobs = say, jobs

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._say(f"{trial}: started")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        job = self._jobs[trial.config["name"]]
        given_up = ": given up" if job.trial.stopped else ""
        figure = f"top-1 {result['figure']:.2%}" if job.by == "top1" else f"loss {result['figure']:.4f}"
        self._say(f"{trial}: step {result['at']:,} of {job.steps:,}, {figure}{given_up}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        error = unattended.last_error(self._jobs[trial.config["name"]].trial.folder.path)
        self._say(f"{trial}: failed: {error or 'its process ended'}")


def check_room(workers: int) -> None:
    """Check that some node of Ray has devices for all ranks of a trial. Tune would wait forever for one.

    Raises:
        LaunchError: no node has.
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
    """Run the trials in `open_`, as many at the same time as there are devices for. ASHA's rungs are at `every`,
    `every` x keep, ... steps; one setting in `keep` continues past each, and None lets all finish. `firsts`: for each
    trial, by name, the trial that is judged for it.

    Raises:
        RunFailed: our own Ray died. (If a stop was requested, that is its end.)
    """
    # turn off Tune's own reports, files and signal handling, which interfere with ours
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1", RAY_AIR_NEW_OUTPUT="0")
    os.environ.update(TUNE_PRINT_ALL_TRIAL_ERRORS="0", TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S="0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
    _, gpus = connection.resources()
    threads = None if gpus else 1
    jobs = {one.name: _Job(one, steps(one), by, every, workers, threads, Path.cwd(), firsts[one.name]) for one in open_}
    judged = [one for one in past if firsts[one.name] is one]
    resources = {"cpu": workers, "gpu": workers if gpus else 0}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_Run, jobs=jobs), resources),
        param_space={"name": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            scheduler=_Asha(judged, jobs, keep) if keep is not None else FIFOScheduler(),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=_SCRATCH,
            storage_path=str(folder),
            verbose=0,
            stop=_StopRequest(stop),
            callbacks=[_Reporter(say, jobs)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    errors: list[Exception] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:
            errors.append(error)

    # in a thread: Tune's calls to a head that died return after 30 s, when Ray's C code ends the process
    thread = threading.Thread(target=fit, daemon=True, name="tune")
    thread.start()
    while thread.is_alive() and connection.died() is None:
        thread.join(_POLL_S)
    died = connection.died()
    if died is not None:
        connection.abandon(Stopped.exit_code if stop.asked else RunFailed.exit_code)
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
    if died is not None and not stop.asked:
        raise RunFailed(f"Ray's {died} on this machine died, and the trials with it; the same command continues")
    if died is None and errors:
        raise errors[0]


def _name(trial: Any) -> str:
    return trial.config["name"]
