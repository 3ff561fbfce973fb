"""Checkpoints and their mirror: complete or absent, whatever is damaged, in the way or killed."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file

from tests.support import forks, later
from tests.support.shell import Shell
from vimscale.checkpoint import mirror, retention
from vimscale.checkpoint.load import Reader, TrainState, consolidated, newest, read_train_state
from vimscale.checkpoint.save import Saver, write_state
from vimscale.errors import CheckpointError, RunFailed
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime import manifest, run_folder

moto_server = later.module("moto.server")

pytestmark = pytest.mark.usefixtures("alone")

TENSORS = {"weight/a@0": torch.arange(40.0), "weight/b@3": torch.randn(7), "ema/a@0": torch.randn(40)}


def _train_state(step: int) -> TrainState:
    return TrainState(step, {}, step, {"a": [8, 5], "b": [10]}, 1, 1, True)


def _save(folder: Path, *steps: int, **rules: Any) -> list[dict]:
    """Save a checkpoint for each step; returns the events that were emitted."""
    events: list[dict] = []
    saver = Saver(folder, Checkpoint(**rules), "run", events.append)
    for step in steps:
        saver.save(TENSORS, _train_state(step))
    saver.close()
    return events


def _damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_announced_once_it_exists_and_holds_what_was_copied(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, Checkpoint(), "run", lambda event: seen.append(newest(folder)))
    seen: list[Path | None] = []
    mine = {name: tensor.clone() for name, tensor in TENSORS.items()}
    saver.save(mine, _train_state(10))
    for tensor in mine.values():
        tensor.zero_()  # the next step's update
    saver.wait()
    path = folder / "step_00000010"
    assert seen == [path]
    assert _names(folder) == [path.name]
    assert _names(path) == ["manifest.json", "state-00000-of-00001.safetensors", "trainer.json"]
    found = load_file(path / "state-00000-of-00001.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_the_newest_stay_and_multiples_of_keep_every_for_good(tmp_path: Path) -> None:
    events = _save(tmp_path / "c", *range(10, 80, 10), keep=2, keep_every=30)
    assert [event["step"] for event in events] == [10, 20, 30, 40, 50, 60, 70]
    assert _names(tmp_path / "c") == [f"step_000000{n}" for n in (30, 60, 70)]


def test_the_newest_regular_checkpoint_stays_however_many_stops_add(tmp_path: Path) -> None:
    _save(tmp_path / "c", 10, 20, 21, 22, 23, every=10, keep=1)
    assert _names(tmp_path / "c") == ["step_00000020", "step_00000023"]


def test_a_rollback_uses_a_checkpoint_of_a_stop_only_if_there_is_no_other(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Checkpoint(), "run", lambda event: None)
    for step in (10, 13):
        saver.save(TENSORS, replace(_train_state(step), asked=step == 13))
    saver.close()
    assert newest(tmp_path) == tmp_path / "step_00000013"
    assert newest(tmp_path, regular=True) == tmp_path / "step_00000010"
    retention.remove(tmp_path / "step_00000010")
    assert newest(tmp_path, regular=True) == tmp_path / "step_00000013"


def test_saving_the_same_state_again_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    path = tmp_path / "step_00000010"
    state = path / "state-00000-of-00001.safetensors"
    _save(tmp_path, 10)
    before = state.stat()
    assert [event["step"] for event in _save(tmp_path, 10)] == [10]
    assert state.stat() == before
    saver = Saver(tmp_path, Checkpoint(), "run", lambda event: None)
    saver.save(TENSORS, replace(_train_state(10), updates=9))
    saver.close()
    assert read_train_state(path).updates == 9, "another state of that step replaces it"
    for number in ("", "_2"):
        _damage(state)
        _save(tmp_path, 10)
        assert manifest.damage(path) is None
        assert manifest.damage(tmp_path / f"damaged_step_00000010{number}") is not None


def test_every_damage_is_detected(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    path = tmp_path / "step_00000010"
    assert manifest.damage(path) is None
    rng = random.Random(0)
    files = sorted(path.iterdir())
    for number in range(400):
        file = files[number % len(files)]
        intact = file.read_bytes()
        if rng.random() < 0.2:
            file.write_bytes(intact[: rng.randrange(len(intact))])
        else:
            data = bytearray(intact)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        assert manifest.damage(path) is not None, (number, file)
        file.write_bytes(intact)
    assert manifest.damage(path) is None


def _swap(a: Path, b: Path) -> None:
    a.rename(a.with_name("between"))
    b.rename(a)
    a.with_name("between").rename(b)


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "c"
    _save(folder, 10, 20, 30)
    _swap(folder / "step_00000020", folder / "step_00000030")
    assert run_folder.damage(folder / "step_00000030") == "it is of step 20; its name would be step_00000020"
    assert newest(folder) == folder / "step_00000010"
    assert _names(folder) == ["damaged_step_00000020", "damaged_step_00000030", "step_00000010"]
    assert "step_00000030 is damaged and set aside as damaged_step_00000030: it is of step 20" in caplog.text


def test_a_copy_under_another_steps_name_is_damaged(tmp_path: Path, address: str) -> None:
    _save(tmp_path / "c", 10, 20, mirror=address)
    there = mirror.open_mirror(address, "run")
    assert there is not None
    for entry in (*manifest.files(tmp_path / "c/step_00000010"), {"name": manifest.NAME}):
        there.put("step_00000030", entry["name"], tmp_path / "c/step_00000010" / entry["name"])
    there.finish("step_00000030", (tmp_path / "c/step_00000010" / manifest.NAME).read_bytes())
    assert list(mirror.faults(there, "step_00000030")) == ["it is of step 10; its name would be step_00000010"]
    assert newest(tmp_path / "c", there) == tmp_path / "c/step_00000020"


FOREIGN = (
    "step_latest",
    "step_7",
    "step_0000010",
    "step_00000010.bak",
    "step_-0000010",
    "step_",
    "step_" + "\N{ARABIC-INDIC DIGIT ONE}" * 8,
)


def test_names_of_others_are_ignored_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    _save(folder, 10)
    for name in FOREIGN:
        shutil.copytree(folder / "step_00000010", folder / name)
    assert newest(folder) == folder / "step_00000010"
    _save(folder, 20, keep=1)
    retention.remove_after(folder / "step_00000020")
    assert _names(folder) == sorted([*FOREIGN, "step_00000020"])


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b'{"step": "10"}', b'{"step": true}', b"\xff"])
def test_a_trainer_file_without_a_step_is_damage_even_if_its_sha256_is_right(tmp_path: Path, text: bytes) -> None:
    _save(tmp_path, 10, 20)
    train_state = tmp_path / "step_00000020/trainer.json"
    train_state.write_bytes(text)
    names = ("state-00000-of-00001.safetensors", "trainer.json")
    manifest.write(train_state.parent, [manifest.seal(train_state.with_name(name)) for name in names])
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        read_train_state(train_state.parent)
    assert newest(tmp_path) == tmp_path / "step_00000010"


def test_a_checkpoint_of_an_older_version_is_reported_and_left_alone(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    path = tmp_path / "step_00000010"
    listing = path / "manifest.json"
    listing.write_text(json.dumps({"format": 1, "files": json.loads(listing.read_text())["files"]}))
    with pytest.raises(CheckpointError, match="its format is 1, this version reads 2"):
        newest(tmp_path)
    assert path.is_dir()


class _Hostile:
    def __init__(self, witness: Path):
        self._witness = witness

    def __reduce__(self) -> tuple:
        return Path.touch, (self._witness,)


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder, witness = tmp_path / "c", tmp_path / "run"
    _save(folder, 10)
    path = folder / "step_00000010"
    hostile = pickle.dumps(_Hostile(witness))
    for name in ("state-00001-of-00002.safetensors", "extra.pt", "extra.pkl"):
        (path / name).write_bytes(hostile)
    assert newest(folder) == path
    assert torch.equal(Reader(path).read("weight", "a", 0, 40), TENSORS["weight/a@0"])

    state = path / "state-00000-of-00001.safetensors"
    state.write_bytes(hostile)
    assert manifest.damage(path) is not None
    manifest.write(path, [manifest.seal(state), manifest.seal(path / "trainer.json")])  # sealed again
    assert newest(folder) == path
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        Reader(path)
    assert not witness.exists()


def test_a_state_file_is_what_the_library_reads(tmp_path: Path) -> None:
    odd = {"a": torch.randn(3), "empty": torch.zeros(0), "ü": torch.randn(2, 5)}
    write_state(tmp_path / "x.safetensors", odd)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == odd.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in odd.items())


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    folder, names = tmp_path / "c", ["step_99999999", "step_100000000", "step_00000010"]
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / manifest.NAME).touch()
    assert [path.name for path in run_folder.checkpoints(folder)] == [names[1], names[0], names[2]]
    assert retention.surplus(names, Checkpoint(keep=1, every=7)) == [names[0], names[2]]
    retention.remove_after(folder / names[0])
    assert _names(folder) == [names[2], names[0]]


def test_the_mirror_is_asked_for_what_the_run_does_not_have_intact() -> None:
    asked = []

    def is_intact(name: str, from_mirror: bool) -> bool:
        asked.append((name, from_mirror))
        return name == "step_00000020"

    here, mirrored = ["step_00000020", "step_00000040"], ["step_00000010", "step_00000040", "step_00000050"]
    assert next(run_folder.intact(here, mirrored, is_intact)) == "step_00000020"
    assert asked == [
        ("step_00000050", True),
        ("step_00000040", False),
        ("step_00000040", True),
        ("step_00000020", False),
    ]
    assert list(run_folder.intact(here, mirrored, is_intact)) == ["step_00000020"]


# ---- the mirror


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    urlopen(Request(f"http://{host}:{port}/runs", method="PUT")).close()
    yield "s3://runs/all"
    server.stop()


@pytest.fixture(params=["folder", "bucket"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "elsewhere") if request.param == "folder" else request.getfixturevalue("bucket")


def test_the_newest_is_copied_to_the_mirror_and_fetched_from_there(tmp_path: Path, address: str) -> None:
    folder = tmp_path / "c"
    for step in (10, 20, 30):
        _save(folder, step, keep=2, mirror=address)
    there = mirror.open_mirror(address, "run")
    assert there is not None
    assert there.names() == ["step_00000030", "step_00000020"]
    shutil.rmtree(folder / "step_00000030")
    shutil.rmtree(folder / "step_00000020")
    found = newest(folder, there)
    assert found == folder / "step_00000030"
    assert torch.equal(Reader(found).read("ema", "a", 0, 40), TENSORS["ema/a@0"])

    for number in ("", "_2"):
        _damage(found / "trainer.json")
        (folder / ".step_00000030.fetched").mkdir()  # by a process that was killed then
        assert newest(folder, there) == found, "a damaged one is replaced by its copy"
        assert (folder / f"damaged_step_00000030{number}").is_dir()


def test_what_the_mirror_has_intact_is_not_written_again(tmp_path: Path, address: str) -> None:
    there = mirror.open_mirror(address, "run")
    assert there is not None
    _save(tmp_path, 10, mirror=address)
    text = (tmp_path / "step_00000010/trainer.json").read_bytes()
    assert mirror.has(there, "step_00000010", text)
    assert not mirror.has(there, "step_00000010", text + b" ")
    assert not mirror.has(there, "step_00000020", text)
    there.put("step_00000010", "trainer.json", text[:-1])
    if not address.startswith("s3:"):
        copies = Path(address) / "run"
        (copies / ".step_00000010.partial/trainer.json").rename(copies / "step_00000010/trainer.json")
    assert list(mirror.faults(there, "step_00000010")) == ["trainer.json does not have the sha256 it was written with"]
    _save(tmp_path, 10, mirror=address)
    assert mirror.has(there, "step_00000010", text), "a damaged copy is replaced"


class _Blocked:
    """A store that writes nothing until `open` is set."""

    def __init__(self, store: mirror.CheckpointStore):
        self._store, self.open = store, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, *arguments: Any) -> None:
        self.open.wait()
        self._store.put(*arguments)


def test_a_slow_mirror_gets_the_newest_first_and_all_that_stay_for_good(tmp_path: Path) -> None:
    there = mirror.open_mirror(str(tmp_path / "there"), "run")
    assert there is not None
    blocked = _Blocked(there)
    copier = mirror.Copier(blocked, Checkpoint(keep=1, keep_every=20))
    _save(tmp_path / "c", 10, 20, 30, 40, 50, keep=9)
    for step in (10, 20, 30, 40, 50):
        copier.offer(tmp_path / f"c/step_000000{step}")
    assert copier.needed() >= {"step_00000020", "step_00000040", "step_00000050"}
    blocked.open.set()
    copier.wait()
    assert there.names() == ["step_00000050", "step_00000040", "step_00000020"]


def test_a_relative_mirror_starts_from_the_working_directory() -> None:
    chosen = recipe.load("vim_digits_cpu", ["checkpoint.mirror=../elsewhere"])
    assert chosen.checkpoint.mirror == str(Path.cwd().parent / "elsewhere")


SLOW = """
import sys, time
from multiprocessing import get_context
from pathlib import Path
from vimscale.checkpoint import mirror
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

class Slow:
    def __init__(self, store):
        self._store = store
    def __getattr__(self, name):
        return getattr(self._store, name)
    def read(self, *arguments):
        for piece in self._store.read(*arguments):
            time.sleep(0.5)
            yield piece

def rank(number, folder):
    spec = RankSpec(recipe.load("vim_digits_cpu"), folder, number, 2, "cpu", 1, f"file://{folder}/meet", "lo", 2.0)
    distributed.prepare(spec)
    distributed.join(spec)
    from vimscale.checkpoint import load
    from vimscale.runtime.heartbeat import heartbeat

    store = Slow(mirror.open_mirror(f"{folder}/there", "run"))
    found = load.newest(folder / "here", store)
    assert found == folder / "here/step_00000010", found
    assert heartbeat.beats >= 3, heartbeat.beats
    moving = heartbeat.beats
    distributed.together((lambda: time.sleep(3)) if number == 0 else None)
    assert heartbeat.beats <= moving + 1, "nothing moves, and the watchdog must see that"
    distributed.leave()

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ranks = [get_context("fork").Process(target=rank, args=(number, folder)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
"""


@pytest.mark.slow
def test_ranks_wait_longer_for_a_slow_mirror_than_for_each_other(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "c", Checkpoint(mirror=str(tmp_path / "there")), "run", lambda event: None)
    saver.save({"weight/a@0": torch.zeros(2_000_000)}, _train_state(10))
    saver.close()
    (tmp_path / "here").mkdir()
    done = forks.run(SLOW, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--no-ray",), ()], ids=["processes", "ray"])
def test_a_run_whose_disk_is_full_on_one_rank_saves_to_the_mirror_and_resumes_from_it(
    shell: Shell, bucket: str, how: tuple[str, ...]
) -> None:
    changes = ("steps=40", "checkpoint.every=10", "log.every=1", "parallel.zero=1", "--workers", "2", *how)
    here = shell.folder / "runs/full/checkpoints"
    shell.run("launch", "small.yaml", "name=calm", *changes)
    shell.env |= {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    full = ("launch", "small.yaml", "name=full", f"checkpoint.mirror={bucket}", *changes)
    process = shell.popen(*full)
    shell.reaches(process, "full", 12)
    rank = shell.process_of("full", 1)
    assert rank is not None
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (100 << 10, resource.RLIM_INFINITY))
    said = shell.finish(process, expect=1)
    found = re.search(rf"checkpoint \S+/(step_\d+) could not be written: .*; it is at {bucket}/full/\1 instead", said)
    assert found is not None, said
    before = run_folder.checkpoints(here)
    assert before
    assert all(path.name < found[1] and manifest.damage(path) is None for path in before)
    assert f"resumed from {here / found[1]}" in shell.run(*full)
    assert shell.losses("full") == shell.losses("calm")
    ours, theirs = (run_folder.checkpoints(shell.folder / f"runs/{name}/checkpoints")[0] for name in ("full", "calm"))
    for kind in ("weight", "ema"):
        both = [consolidated(path, kind).values() for path in (ours, theirs)]
        assert all(map(torch.equal, *both))


def test_the_mirror_takes_what_the_run_folder_cannot(tmp_path: Path, address: str) -> None:
    (tmp_path / "file").write_text("in the way")
    saver = Saver(tmp_path / "file" / "c", Checkpoint(mirror=address), "run", lambda event: None)
    saver.save(TENSORS, _train_state(10))
    with pytest.raises(RunFailed, match=rf"could not be written: .*; it is at {address}/run/step_00000010 instead"):
        saver.wait()
    found = newest(tmp_path / "c", mirror.open_mirror(address, "run"))
    assert found == tmp_path / "c/step_00000010"
    assert read_train_state(found) == _train_state(10)


# ---- kills


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_after_a_kill_at_any_instant_the_newest_checkpoint_loads(shell: Shell, kills: int) -> None:
    rng = random.Random(kills)
    folder = shell.folder / "runs/small/checkpoints"
    arguments = ("launch", "small.yaml", "steps=100000", "checkpoint.every=1", "--no-ray", "--workers", "1")
    for _ in range(kills):
        before = run_folder.checkpoints(folder)[:1]
        process = shell.popen(*arguments)
        while run_folder.checkpoints(folder)[:1] == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(rng.random() * 0.3)
        text = (shell.folder / "runs/small/logs/rank_00000.txt").read_text()
        os.kill(int(re.findall(r"process (\d+) on", text)[-1]), signal.SIGKILL)
        process.kill()
        process.communicate()
        left = run_folder.checkpoints(folder)
        assert manifest.damage(left[0]) is None
        assert consolidated(left[0], "weight")
        assert read_train_state(left[0]).step == int(left[0].name.removeprefix("step_"))
