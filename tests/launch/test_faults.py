"""Whatever happens to a run, the same command given again ends it with the bits of an undisturbed one."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.faults import SCHEDULED, Fault, Full, SmallDisk, run_on, schedule, survive
from tests.support.shell import EVERYTHING, Shell, new_shell
from vimscale.checkpoint.load import consolidated
from vimscale.engine.deepspeed_engine import MOMENTS
from vimscale.runtime import manifest, run_folder

PROCESSES = ("--workers", "2", "--no-ray")
RAY = ("--workers", "2")
PLAIN = ("parallel.zero=3", "parallel.persist=0")

Calm = Callable[[tuple[str, ...]], Shell]


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Calm:
    """The run `small` with some changes, undisturbed, without Ray, whose bits are the same (test_launch)."""
    made: dict[tuple[str, ...], Shell] = {}

    def undisturbed(changes: tuple[str, ...]) -> Shell:
        if changes not in made:
            made[changes] = new_shell(tmp_path_factory.mktemp("calm"), cache)
            made[changes].run("launch", "small.yaml", *changes, *PROCESSES, timeout=600)
        return made[changes]

    return undisturbed


@pytest.fixture
def watched(shell: Shell) -> Iterator[Shell]:
    """A shell with a folder for temporary files; it leaves no process behind, whatever becomes of its test."""
    shell.env["TMPDIR"] = tempfile.mkdtemp(prefix="v-")  # below pytest's own the names of sockets would be too long
    yield shell
    shell.end()
    shutil.rmtree(shell.env["TMPDIR"])


def _figures(shell: Shell, name: str) -> list[dict]:
    """All rows of metrics.jsonl, without what depends on the clock and the machine."""
    rows = [row for kind in ("train", "eval", "layers") for row in shell.rows(name, kind)]
    timings = {"images_per_s", "data_wait", "read_mb_per_s", "memory_gb"}
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


def _state(shell: Shell, name: str) -> dict[str, torch.Tensor]:
    """Weights, moving average and the optimizer's moments at the run's end."""
    newest = run_folder.checkpoints(shell.folder / "runs" / name / "checkpoints")[0]
    assert manifest.damage(newest) is None
    return {
        f"{kind}/{key}": value
        for kind in ("weight", "ema", *MOMENTS)
        for key, value in consolidated(newest, kind).items()
    }


def _result(shell: Shell, name: str) -> dict:
    return json.loads((shell.folder / "runs" / name / "result.json").read_text())


def _ends_as_if_nothing_had_been(
    shell: Shell, calm: Shell, changes: tuple[str, ...], how: tuple[str, ...], faults: list[Fault]
) -> None:
    said = survive(shell, "hit", ("small.yaml", "name=hit", *changes, *how), faults)
    shell.nothing_is_left()
    assert os.listdir(shell.env["TMPDIR"]) == []
    told = f"{faults}\n{'---'.join(said)}"
    assert shell.losses("hit") == calm.losses("small"), told
    assert _figures(shell, "hit") == _figures(calm, "small"), told
    ours, theirs = _state(shell, "hit"), _state(calm, "small")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours), told
    assert _result(shell, "hit") == _result(calm, "small"), told


@pytest.mark.parametrize(
    ("how", "faults"),
    [
        pytest.param(PROCESSES, [Fault("kill rank", "save", 12, rank=1)], id="rank-in-save", marks=pytest.mark.slow),
        pytest.param(PROCESSES, [Fault("damage", "step", 20)], id="launcher-and-damage"),
        pytest.param(RAY, [Fault("kill rank", "save", 12, rank=0)], id="ray-rank-in-save"),
    ],
)
def test_a_few_faults_leave_no_trace(watched: Shell, calm: Calm, how: tuple[str, ...], faults: list[Fault]) -> None:
    changes = (*SCHEDULED, *PLAIN)
    how = (*how, "data.workers=1")  # which leave temporary files where nobody removes them
    _ends_as_if_nothing_had_been(watched, calm(changes), changes, how, faults)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_of_faults_leaves_no_trace(watched: Shell, calm: Calm, seed: int) -> None:
    ray, everything = seed % 2 == 1, seed // 2 % 2 == 1
    changes = (*SCHEDULED, *(EVERYTHING if everything else PLAIN))
    faults = schedule(seed, ray=ray)
    _ends_as_if_nothing_had_been(watched, calm(changes), changes, RAY if ray else PROCESSES, faults)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20, 32))
def test_a_schedule_that_hits_data_workers_and_rays_helpers_leaves_no_trace(
    watched: Shell, calm: Calm, seed: int
) -> None:
    changes = (*SCHEDULED, *EVERYTHING)
    faults = schedule(seed, ray=seed % 2 == 1, helpers=True)
    _ends_as_if_nothing_had_been(watched, calm(changes), changes, RAY if seed % 2 == 1 else PROCESSES, faults)


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
@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_fills_at_any_instant_ends_the_run_with_its_message_or_not_at_all(
    watched: Shell, disk: SmallDisk, calm: Calm, seed: int
) -> None:
    changes = (*SCHEDULED, *PLAIN)
    full = Full.drawn(seed)
    command = ("small.yaml", "name=hit", *changes, *PROCESSES)
    code, said = run_on(disk, full, watched, "hit", command)
    told = f"{full}\n{said}"
    assert code == 0 or (code == 1 and "could not be written" in said), told
    assert "Traceback" not in said, told
    assert "hangs" not in said, told
    disk.empty()
    if code:
        said += watched.finish(watched.popen("launch", *command, inside=disk.inside), timeout=600)
    assert disk.seen.losses("hit") == calm(changes).losses("small"), told
    assert _figures(disk.seen, "hit") == _figures(calm(changes), "small"), told


@pytest.mark.slow
def test_a_checkpoint_that_is_made_again_may_be_damaged_again(watched: Shell, calm: Calm) -> None:
    changes = (*SCHEDULED, *PLAIN)
    faults = [Fault("damage", "step", 20, luck=0.1), Fault("damage", "step", 22, luck=0.2)]
    _ends_as_if_nothing_had_been(watched, calm(changes), changes, PROCESSES, faults)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_that_change_ranks_and_stage_leave_the_losses_as_they_were(watched: Shell) -> None:
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
    assert max(abs(a - b) / abs(b) for a, b in zip(moved, calm, strict=True)) < 1e-5
