"""The trackers of a run: which libraries they need, what they are called, and what each of them gets."""

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

import vimscale
from vimscale.errors import LaunchError
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.heartbeat import heartbeat
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import files
from vimscale.tracking.base import About, Ending, Figures, Item, Picture, Tracker, values
from vimscale.tracking.sender import Sender
from vimscale.tracking.tensorboard import Board

log = logging.getLogger(__name__)

TRACKERS = {"wandb": "Wandb", "mlflow": "Mlflow", "trackio": "Trackio"}
"""Trackers beside TensorBoard, each with its class in on_NAME.py; its library and the extra have its name."""
VARIABLES = {"wandb": ("WANDB_API_KEY", "WANDB_MODE"), "mlflow": ("MLFLOW_TRACKING_URI",)}
"""Environment variables of which a tracker needs one where no person has logged in."""

_SAVED_EVERY_S = 1.0
"""Seconds between notes of what was sent."""


def check(recipe: Recipe) -> None:
    """Check before training that the trackers that the recipe names can be used, without importing them.

    Raises:
        LaunchError: a library is missing, or MLflow has no address.
    """
    named = [name for name in recipe.log.to if name in TRACKERS]
    if missing := [name for name in named if importlib.util.find_spec(name) is None]:
        raise LaunchError(
            f"log.to: {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed:"
            f" pip install 'vimscale[{','.join(missing)}]'"
        )
    if "mlflow" in named and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise LaunchError(
            "log.to: mlflow has no address: export MLFLOW_TRACKING_URI=http://HOST:5000, or the URI of another store"
        )


class Trackers:
    """What a run reports to besides metrics.jsonl. Nothing here ends or delays the run."""

    def __init__(self, folder: RunFolder, recipe: Recipe, start: int, device: str):
        """`start`: the step that this process resumes from. `device`: what the ranks compute on."""
        self._folder, self._recipe, self._start, self._device = folder, recipe, start, device
        self._opened = False
        self._board: Board | None = None
        self._senders: list[Sender] = []

    def open(self) -> None:
        """Begin, before the first new row: send each tracker the rows up to `start` that it lacks."""
        if self._opened:
            return
        self._opened = True
        named = self._recipe.log.to
        self._board = Board(self._folder.tensorboard, self._start) if "tensorboard" in named else None
        state = State(self._folder.path / "trackers.json", self._start)
        chosen = [name for name in named if name in TRACKERS]
        rows = _figures(self._folder.rows()) if self._start and chosen else []
        for name in chosen:
            sender = Sender(name, self._make(name, state))
            self._senders.append(sender)
            sent = state.sent(name)
            for figures in rows:
                if sent.get(_kind(figures), 0) < figures.step <= self._start:
                    sender.add(figures)

    def _make(self, name: str, state: "State") -> Callable[[], Tracker]:
        tags = describe(self._folder, self._device)
        config = yaml.safe_load(self._recipe.to_yaml())
        about = (self._recipe.name, self._recipe.log.project, self._folder.path.absolute())

        def make() -> Tracker:
            kind = getattr(importlib.import_module(f"vimscale.tracking.on_{name}"), TRACKERS[name])
            tracker: Tracker = kind(About(*about, state.id(name), self._start, config, tags))
            state.begin(name, tracker.id)
            return Noted(name, tracker, state)

        return make

    def write(self, row: dict[str, Any]) -> None:
        """Report a row of metrics.jsonl."""
        if found := values(row):
            self._add(Figures(row["step"], row.get("time", time.time()), found))

    def picture(self, step: int, tag: str, png: bytes) -> None:
        """Report a picture, a PNG file."""
        self._add(Picture(step, time.time(), tag, png))

    def _add(self, item: Item) -> None:
        if self._board is not None:
            self._board.add(item)
        for sender in self._senders:
            sender.add(item)

    def go_back(self, step: int) -> None:
        """Take note that the run returns to an earlier step. TensorBoard hides what came after it; the others show it
        next to what comes now.
        """
        self._start = step
        if self._board is not None:
            self._board.close()
            self._board = Board(self._folder.tensorboard, step)

    def close(self, ending: Ending) -> None:
        """Send what is left, for a bounded time; to all trackers at once."""
        if self._board is not None:
            self._board.close()
        closing = [threading.Thread(target=sender.close, args=(ending,)) for sender in self._senders]
        for thread in closing:
            thread.start()
        for thread in closing:
            while thread.is_alive():
                thread.join(0.5)
                heartbeat.beat(heartbeat.doing)
        self._board, self._senders = None, []


class State:
    """trackers.json in a run's folder: by tracker, what it calls the run, and the last step that it got of each kind of
    row.
    """

    def __init__(self, path: Path, start: int):
        """`start`: the step that this process resumes from. What comes after it is sent again."""
        self._path = path
        self._changing = threading.Lock()
        self._warned = False
        self._known: dict[str, dict[str, Any]] = {}
        try:
            self._known = {name: _entry(found, start) for name, found in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError, AttributeError):
            log.warning("%s is damaged: the trackers begin a new run", path)

    def id(self, name: str) -> str | None:
        with self._changing:
            return self._known[name]["id"] if name in self._known else None

    def sent(self, name: str) -> dict[str, int]:
        """The last step that the tracker got of each kind of row."""
        with self._changing:
            return dict(self._known[name]["sent"]) if name in self._known else {}

    def begin(self, name: str, id: str) -> None:
        if self.id(name) != id:
            with self._changing:
                self._known[name] = {"id": id, "sent": {}}
            self.save()

    def add(self, name: str, items: list[Item]) -> None:
        """Take note that the tracker got the items."""
        with self._changing:
            self._known[name]["sent"] |= {_kind(item): item.step for item in items if isinstance(item, Figures)}

    def save(self) -> None:
        with self._changing:
            try:
                files.write(self._path, json.dumps(self._known, indent=1) + "\n")
            except OSError as error:  # trying to connect again would begin another run
                if not self._warned:
                    log.warning("%s: a restart may begin new runs in trackers", files.refusal(error))
                self._warned = True


def _entry(found: dict[str, Any], start: int) -> dict[str, Any]:
    return {"id": str(found["id"]), "sent": {kind: min(int(step), start) for kind, step in found["sent"].items()}}


class Noted:
    """A tracker that takes note of what it got."""

    def __init__(self, name: str, tracker: Tracker, state: State):
        self.id = tracker.id
        self._name, self._tracker, self._state = name, tracker, state
        self._saved = time.monotonic()

    def send(self, items: list[Item]) -> None:
        self._tracker.send(items)
        self._state.add(self._name, items)
        if time.monotonic() - self._saved > _SAVED_EVERY_S:
            self._state.save()
            self._saved = time.monotonic()

    def close(self, ending: Ending) -> None:
        self._state.save()
        self._tracker.close(ending)


def _kind(figures: Figures) -> str:
    return next(iter(figures.values)).split("/")[0]


def _figures(rows: list[dict[str, Any]]) -> list[Figures]:
    """What rows of metrics.jsonl hold for trackers. A row without a time gets that of the next one that has it."""
    found: list[Figures] = []
    at = time.time()
    for row in reversed(rows):
        at = row.get("time", at)
        if numbers := values(row):
            found.append(Figures(row["step"], at, numbers))
    return found[::-1]


def describe(folder: RunFolder, device: str) -> dict[str, str]:
    """Tags of a run: device, version, the commit of this code if it is a git checkout, and where a fork began."""
    tags = {"device": device, "vimscale": vimscale.__version__}
    command = ["git", "-C", str(Path(vimscale.__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        tags["commit"] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        log.info("no commit is known: vimscale is not run from a git checkout")
    if (origin := folder.origin()) is not None:
        tags["origin"] = f"{origin['run']}@{origin['step']}"
    return tags


def missing_variables(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Trackers for which a cluster's jobs have none of the variables that they need, each with the names to choose
    from.
    """
    needed = {name: VARIABLES[name] for name in names if name in VARIABLES}
    return {name: " or ".join(choices) for name, choices in needed.items() if not {*choices} & {*known}}
