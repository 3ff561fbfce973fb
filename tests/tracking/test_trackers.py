"""Trackers as a user has them: which are refused, and what real ones hold after runs, restarts and failures."""

import json
import os
import sqlite3
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support import mlflow_server
from tests.support.mlflow_server import Server
from tests.support.shell import Shell
from vimscale.errors import LaunchError, RecipeError
from vimscale.launch.cluster import load as load_cluster
from vimscale.launch.jobs.backend import for_cluster
from vimscale.recipe.recipe import load
from vimscale.runtime.run_folder import RunFolder
from vimscale.tracking import trackers
from vimscale.tracking.base import About, Ending, Figures, Item
from vimscale.tracking.on_mlflow import _allowed
from vimscale.tracking.trackers import State, Trackers
from vimscale.training.metrics import Metrics

PROCESSES = ("--workers", "2", "--no-ray")
TAGS = {"train/loss", "train/lr", "eval/top1", "layers/dt_max/00"}


# ---- what is refused


def test_a_missing_library_is_one_message_with_its_pip_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    recipe = load("vim_digits_cpu", ["log.to=[tensorboard,wandb,trackio]"])
    with pytest.raises(LaunchError, match=r"wandb, trackio are not installed: pip install 'vimscale\[wandb,trackio\]'"):
        trackers.check(recipe)


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_launch_without_the_library_ends_before_training(shell: Shell) -> None:
    output = shell.run("launch", "small.yaml", "log.to=[trackio]", *PROCESSES, expect=2)
    assert "log.to: trackio is not installed: pip install 'vimscale[trackio]'" in output
    assert not (shell.folder / "runs").exists()


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(LaunchError, match="export MLFLOW_TRACKING_URI=http://HOST:5000"):
        trackers.check(load("vim_digits_cpu", ["log.to=[mlflow]"]))


def test_recipes_name_each_tracker_once_and_may_name_none() -> None:
    assert load("vim_digits_cpu").log.to == ("tensorboard",)
    assert load("vim_digits_cpu", ["log.to=[]"]).log.to == ()
    with pytest.raises(RecipeError, match="named twice"):
        load("vim_digits_cpu", ["log.to=[wandb,wandb]"])
    with pytest.raises(RecipeError, match=r"log\.to"):
        load("vim_digits_cpu", ["log.to=[comet]"])


def test_a_job_needs_the_trackers_variables_and_a_key_is_a_secret() -> None:
    nodes = ["gpus=0", "gpu=null", "nodes=1", "cpus=2", "workers=2"]
    recipe = load("vim_digits_cpu", ["log.to=[wandb,mlflow]"])
    with pytest.raises(RecipeError) as refused:
        for_cluster(recipe, load_cluster("slurm", nodes))
    assert "log.to: wandb needs WANDB_API_KEY or WANDB_MODE" in str(refused.value)
    assert "log.to: mlflow needs MLFLOW_TRACKING_URI" in str(refused.value)
    named = ["secrets=[WANDB_API_KEY]", "environment={MLFLOW_TRACKING_URI: 'http://tracker:5000'}"]
    assert for_cluster(recipe, load_cluster("slurm", [*nodes, *named])) == recipe


# ---- what a run keeps


def test_no_tracker_is_named_so_nothing_but_the_rows_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    quiet = Trackers(run, load("vim_digits_cpu", ["log.to=[]"]), 0, "cpu")
    quiet.open()
    quiet.write({"kind": "train", "step": 1, "loss": 1.0})
    quiet.close("done")
    assert not run.path.exists()


def test_ids_survive_and_damage_begins_new_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trackers.json"
    state = State(path, 0)
    state.begin("wandb", "a1")
    state.begin("mlflow", "b2")
    again = State(path, 0)
    assert (again.id("wandb"), again.id("mlflow"), again.id("trackio")) == ("a1", "b2", None)
    for damaged in ("{", "[]", '{"wandb": "a1"}', '{"wandb": {"id": "a1", "sent": {"train": null}}}'):
        path.write_text(damaged)
        assert State(path, 0).id("wandb") is None
        assert "is damaged: the trackers begin a new run" in caplog.text
        caplog.clear()


class Stored:
    """A tracker in memory. One that begins while it is `down` fails as long as it lives."""

    down = False
    got: ClassVar[list[Figures]] = []

    def __init__(self, about: About):
        self.id = about.id or "r1"
        self._fails = self.down

    def send(self, items: list[Item]) -> None:
        if self._fails:
            raise ConnectionError
        self.got += [item for item in items if isinstance(item, Figures)]

    def close(self, ending: Ending) -> None: ...


def test_a_resumed_run_sends_what_an_earlier_process_could_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimscale.tracking.on_mlflow.Mlflow", Stored)
    monkeypatch.setattr(Stored, "got", [])
    run, recipe = RunFolder(tmp_path / "run"), load("vim_digits_cpu", ["log.to=[mlflow]"])

    def train(start: int, to: int) -> list[tuple[str, int]]:
        metrics = Metrics(run, start, Trackers(run, recipe, start, "cpu"))
        for step in range(start + 1, to + 1):
            metrics.write({"kind": "train", "step": step, "loss": 1.0, "lr": 0.1})
        metrics.write({"kind": "eval", "step": to, "images": 9, "loss": 1.0})
        metrics.close()
        metrics.trackers.close("stopped")
        sent = [(next(iter(figures.values)).split("/")[0], figures.step) for figures in Stored.got]
        Stored.got.clear()
        return sent

    assert train(0, 3) == [("train", 1), ("train", 2), ("train", 3), ("eval", 3)]
    monkeypatch.setattr(Stored, "down", True)
    assert train(3, 5) == []
    monkeypatch.setattr(Stored, "down", False)
    assert train(5, 6) == [("train", 4), ("train", 5), ("eval", 5), ("train", 6), ("eval", 6)]
    assert train(5, 6) == [("train", 6), ("eval", 6)]


# ---- real trackers


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed: pip install 'vimscale[mlflow]'")
def test_names_become_what_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for tag in ("train/loss", "train/acc@5", "layers/a b-c.d/00", "train/größe:µ"):
        _validate_metric_name(_allowed(tag))
    assert _allowed("layers/dt_max/00") == "layers/dt_max/00"


def _history(folder: Path) -> list[tuple[str, list[dict]]]:
    """(id, rows of the history) of each of W&B's offline runs, the oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        rows, id = [], ""
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            id = record.run.run_id or id
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        found.append((id, rows))
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, a header of 7 bytes before the first."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield parts
            parts = b""


def _environment(shell: Shell, **variables: str) -> None:
    shell.env |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **variables}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install 'vimscale[wandb]'")
def test_wandb_offline_holds_all_rows_and_a_resumed_run_keeps_its_id(shell: Shell) -> None:
    _environment(shell)
    options = ("log.to=[wandb]", "log.images=true", "log.project=trial", "evaluate.every=10", "checkpoint.every=10")
    process = shell.popen("launch", "small.yaml", "steps=120", *options, *PROCESSES)
    shell.reaches(process, "small", 15)
    process.terminate()
    shell.finish(process, expect=3)
    shell.run("launch", "small.yaml", "steps=120", *options, *PROCESSES)
    (first, before), (second, after) = _history(shell.folder / "runs/small/wandb")
    assert first == second == json.loads((shell.folder / "runs/small/trackers.json").read_text())["wandb"]["id"]
    sent = {row["step"]: row["train/loss"] for row in [*before, *after] if "train/loss" in row}
    assert sent == {row["step"]: row["loss"] for row in shell.rows("small")}
    assert set().union(*after) >= TAGS
    assert any("images/first_batch/path" in row for row in before)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if (why := mlflow_server.missing()) is not None:
        pytest.skip(why)
    (tmp_path / "tracker").mkdir()
    server = Server(tmp_path / "tracker")
    server.start()
    yield server
    server.kill()


def _mlflow_losses(address: str, id: str) -> dict[int, set[float]]:
    from mlflow import MlflowClient

    found: dict[int, set[float]] = {}
    for metric in MlflowClient(address).get_metric_history(id, "train/loss"):
        found.setdefault(metric.step, set()).add(metric.value)
    return found


@pytest.mark.slow
def test_mlflow_holds_all_rows_pictures_and_the_recipe_and_a_killed_rank_continues_its_run(
    shell: Shell, server: Server
) -> None:
    from mlflow import MlflowClient

    _environment(shell, MLFLOW_TRACKING_URI=server.address)
    options = ("steps=60", "log.to=[mlflow]", "log.images=true", "checkpoint.every=10", "log.every=1")
    process = shell.popen("launch", "small.yaml", *options, *PROCESSES)
    shell.reaches(process, "small", 25)
    os.kill(shell.process_of("small", 0), 9)
    shell.finish(process)
    assert len(shell.world_sizes("small")) == 2
    client = MlflowClient(server.address)
    (found,) = client.search_runs([client.get_experiment_by_name("vimscale").experiment_id])
    assert found.info.run_id == json.loads((shell.folder / "runs/small/trackers.json").read_text())["mlflow"]["id"]
    assert (found.info.run_name, found.info.status) == ("small", "FINISHED")
    assert found.data.params["optim.lr"] == "0.001"
    assert found.data.tags["device"] == "cpu"
    assert found.data.metrics.keys() >= {"train/loss", "train/images_per_s", "eval/top1"}
    losses = _mlflow_losses(server.address, found.info.run_id)
    rows = shell.rows("small")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert all(row["loss"] in losses[row["step"]] for row in rows)
    assert [each.path for each in client.list_artifacts(found.info.run_id, "images")]


@pytest.mark.slow
def test_a_run_outlives_its_mlflow_server_and_reports_again_when_it_is_back(shell: Shell, server: Server) -> None:
    _environment(shell, MLFLOW_TRACKING_URI=server.address)
    process = shell.popen("launch", "small.yaml", "steps=100000", "log.to=[mlflow]", "evaluate.every=0", *PROCESSES)
    shell.reaches(process, "small", 20)
    ids = shell.folder / "runs/small/trackers.json"
    _until(process, ids.exists)
    server.kill()
    at = shell.rows("small")[-1]["step"]
    shell.reaches(process, "small", at + 60)
    server.start()
    back = shell.rows("small")[-1]["step"]
    id = json.loads(ids.read_text())["mlflow"]["id"]
    _until(process, lambda: max(_mlflow_losses(server.address, id), default=0) > back)
    process.terminate()
    output = shell.finish(process, expect=3)
    assert output.count("mlflow failed and is tried again") == 1
    assert "Retrying" not in output
    losses = _mlflow_losses(server.address, id)
    assert sorted(losses) == list(range(1, max(losses) + 1))


def _until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_neither_the_run_nor_its_end(shell: Shell) -> None:
    if find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed: pip install 'vimscale[mlflow]'")
    _environment(shell, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    output = shell.run("launch", "small.yaml", "steps=20", "log.to=[tensorboard,mlflow]", *PROCESSES)
    assert output.count("mlflow failed and is tried again") == 1
    assert "mlflow lacks" in output
    assert [row["step"] for row in shell.rows("small")] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed: pip install 'vimscale[trackio]'")
def test_trackio_holds_all_rows_and_a_fork_notes_its_origin(shell: Shell) -> None:
    _environment(shell, TRACKIO_DIR=str(shell.folder / "trackio"))
    options = ("log.to=[trackio]", "log.project=trial", *PROCESSES)
    shell.run("launch", "small.yaml", "steps=40", *options)
    shell.run("launch", "small.yaml", "name=forked", "steps=30", "--fork", "small@20", *options)
    with sqlite3.connect(shell.folder / "trackio/trial.db") as base:
        logged = base.execute("select run_name, step, metrics from metrics").fetchall()
        configs = dict(base.execute("select run_name, config from configs").fetchall())
    found = [(name, step, json.loads(data)) for name, step, data in logged]
    sent = {(name, step): values["train/loss"] for name, step, values in found if "train/loss" in values}
    assert {step: loss for (name, step), loss in sent.items() if name == "small"} == {
        row["step"]: row["loss"] for row in shell.rows("small")
    }
    assert sorted(step for name, step in sent if name == "forked") == list(range(1, 31))
    assert json.loads(configs["forked"])["run.origin"].endswith("/runs/small@20")
