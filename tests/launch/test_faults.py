"""Whatever happens to a run, repeating the same command finishes it with the bits of an undisturbed run."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.faults import SCHEDULED, Fault, Full, SmallDisk, run_on, schedule, survive
from tests.support.shell import EVERYTHING, Shell, new_shell, relative_difference
from vimscale.engine.deepspeed_engine import MOMENTS

PROCESSES = ("--workers", "2", "--no-ray")
RAY = ("--workers", "2")
PLAIN = ("parallel.zero=3", "parallel.persist=0")
SHARED = ("parallel.context=2",)

Calm = Callable[[tuple[str, ...]], Shell]


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Calm:
    """Return the undisturbed run `small` with some changes, without Ray: the bits are the same (test_launch)."""
    done: dict[tuple[str, ...], Shell] = {}

    def undisturbed(changes: tuple[str, ...]) -> Shell:
        if changes not in done:
            done[changes] = new_shell(tmp_path_factory.mktemp("calm"), cache)
            done[changes].run("launch", "small.yaml", *changes, *PROCESSES, timeout=600)
        return done[changes]

    return undisturbed


@pytest.fixture
def watched(shell: Shell) -> Iterator[Shell]:
    """Provide a shell with its own folder for temporary files, and kill its processes after the test."""
    shell.env["TMPDIR"] = tempfile.mkdtemp(prefix="v-")  # below pytest's own folder, socket names would be too long
    yield shell
    shell.end()
    shutil.rmtree(shell.env["TMPDIR"])


def _figures(shell: Shell, name: str) -> list[dict]:
    """Return all rows of metrics.jsonl without the fields that depend on the clock and the machine."""
    rows = [row for kind in ("train", "eval", "layers") for row in shell.rows(name, kind)]
    timings = {"images_per_s", "data_wait", "read_mb_per_s", "memory_gb", "time"}
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


def _result(shell: Shell, name: str) -> dict:
    return json.loads((shell.folder / "runs" / name / "result.json").read_text())


def _assert_faults_leave_no_trace(
    shell: Shell, calm: Shell, changes: tuple[str, ...], how: tuple[str, ...], faults: list[Fault]
) -> None:
    said = survive(shell, "hit", ("small.yaml", "name=hit", *changes, *how), faults)
    shell.nothing_is_left()
    assert os.listdir(shell.env["TMPDIR"]) == []
    context = f"{faults}\n{'---'.join(said)}"
    assert shell.losses("hit") == calm.losses("small"), context
    assert _figures(shell, "hit") == _figures(calm, "small"), context
    everything = ("weight", "ema", *MOMENTS)
    ours, theirs = (checkpoints.tensors(*run, *everything) for run in ((shell, "hit"), (calm, "small")))
    assert checkpoints.equal(ours, theirs), context
    assert _result(shell, "hit") == _result(calm, "small"), context


@pytest.mark.parametrize(
    ("how", "more", "faults"),
    [
        pytest.param(PROCESSES, (), [Fault("kill rank", "save", 12, rank=1)], id="save", marks=pytest.mark.slow),
        pytest.param(PROCESSES, (), [Fault("damage", "step", 20)], id="launcher-and-damage", marks=pytest.mark.slow),
        pytest.param(RAY, (), [Fault("kill rank", "save", 12, rank=0)], id="ray-save", marks=pytest.mark.slow),
        pytest.param(PROCESSES, SHARED, [Fault("kill rank", "step", 9, rank=1)], id="shared", marks=pytest.mark.slow),
    ],
)
def test_a_few_faults_leave_no_trace(
    watched: Shell, calm: Calm, how: tuple[str, ...], more: tuple[str, ...], faults: list[Fault]
) -> None:
    changes = (*SCHEDULED, *PLAIN, *more)
    how = (*how, "data.workers=1")  # a data worker makes temporary files, which a killed rank cannot remove
    _assert_faults_leave_no_trace(watched, calm(changes), changes, how, faults)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(8))
def test_a_schedule_of_faults_leaves_no_trace(watched: Shell, calm: Calm, seed: int) -> None:
    ray, everything = seed % 2 == 1, seed // 2 % 2 == 1
    changes = (*SCHEDULED, *(EVERYTHING if everything else PLAIN))
    faults = schedule(seed, ray=ray)
    _assert_faults_leave_no_trace(watched, calm(changes), changes, RAY if ray else PROCESSES, faults)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20, 24))
def test_faults_of_data_workers_and_rays_helpers_leave_no_trace(watched: Shell, calm: Calm, seed: int) -> None:
    changes = (*SCHEDULED, *EVERYTHING)
    faults = schedule(seed, ray=seed % 2 == 1, helpers=True)
    _assert_faults_leave_no_trace(watched, calm(changes), changes, RAY if seed % 2 == 1 else PROCESSES, faults)


@pytest.fixture
def disk(watched: Shell) -> Iterator[SmallDisk]:
    try:
        small = SmallDisk(watched)
    except PermissionError as error:
        pytest.skip(f"a file system of a few megabytes cannot be mounted here: {error}")
    yield small
    watched.end()
    small.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_a_disk_that_fills_at_any_instant_ends_the_run_with_its_message_or_not_at_all(
    watched: Shell, disk: SmallDisk, calm: Calm, seed: int
) -> None:
    changes = (*SCHEDULED, *PLAIN)
    full = Full.drawn(seed)
    command = ("small.yaml", "name=hit", *changes, *PROCESSES)
    code, said = run_on(disk, full, watched, "hit", command)
    context = f"{full}\n{said}"
    assert code == 0 or (code == 1 and "could not be written" in said), context
    assert "Traceback" not in said, context
    assert "hangs" not in said, context
    disk.empty()
    if code:
        said += watched.finish(watched.popen("launch", *command, inside=disk.inside), timeout=600)
    assert disk.seen.losses("hit") == calm(changes).losses("small"), context
    assert _figures(disk.seen, "hit") == _figures(calm(changes), "small"), context


@pytest.mark.slow
def test_a_checkpoint_may_be_damaged_twice(watched: Shell, calm: Calm) -> None:
    changes = (*SCHEDULED, *PLAIN)
    faults = [Fault("damage", "step", 20, luck=0.1), Fault("damage", "step", 22, luck=0.2)]
    _assert_faults_leave_no_trace(watched, calm(changes), changes, PROCESSES, faults)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_and_changes_of_ranks_and_stage_leave_the_losses_unchanged(watched: Shell) -> None:
    changes = ("steps=165", "checkpoint.every=10", "log.every=1")
    watched.run("launch", "small.yaml", "name=calm", *changes, *PROCESSES)
    for zero, world, until in ((1, "2", 55), (3, "1", 110), (2, "2", 165)):
        how = (f"parallel.zero={zero}", "parallel.persist=0", "--no-ray", "--workers", world)
        process = watched.popen("launch", "small.yaml", "name=moved", *changes, *how)
        while process.poll() is None and (until == 165 or len(watched.rows("moved")) < until):
            pass
        if until < 165:
            process.kill()
            process.communicate()
        else:
            watched.finish(process)
    moved, calm = watched.losses("moved"), watched.losses("calm")
    assert len(moved) == len(calm) == 165
    # fp32 sums in another order
    assert relative_difference(moved, calm) < 1e-5
