"""`vimscale checkpoints`: what it reports about real checkpoints, and what it removes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.support.shell import SMALL, Shell
from vimscale.checkpoint import mirror
from vimscale.checkpoint.compare import Pair
from vimscale.checkpoint.load import TrainState
from vimscale.checkpoint.save import Saver, write_state
from vimscale.errors import CheckpointError
from vimscale.launch.commands.app import app
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime import manifest

SHAPES = {"a": [8, 5], "b": [10]}
FIRST = {"weight/a@0": torch.arange(40.0), "weight/b@0": torch.randn(10), "ema/a@0": torch.randn(40)}


def _train_state(step: int, **changes: Any) -> TrainState:
    return TrainState(**{"step": step, "stream": {"at": step}, "updates": step, "shapes": SHAPES, "world": 1, "zero": 1,
                      "ema": True, **changes})  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with four checkpoints, two of them in the mirror; the working directory contains runs/."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/small"
    folder.mkdir(parents=True)
    (tmp_path / "small.yaml").write_text(SMALL)
    chosen = recipe.load("small.yaml", ["checkpoint.mirror=copies", "checkpoint.keep=2", "checkpoint.every=10"])
    (folder / "recipe.yaml").write_text(chosen.to_yaml())
    saver = Saver(folder / "checkpoints", Checkpoint(keep=9), "small", lambda event: None)
    for step in (10, 20, 30, 33):
        saver.save(FIRST, _train_state(step, asked=step == 33))
    saver.close()
    copier = mirror.Copier(_store(), chosen.checkpoint)
    for step in (10, 20):
        copier.offer(folder / f"checkpoints/step_000000{step}")
        copier.wait()
    return folder / "checkpoints"


def _store() -> mirror.CheckpointStore:
    store = mirror.open_mirror("copies", "small")
    assert store is not None
    return store


def _said(*arguments: str, expect: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoints", *arguments], catch_exceptions=False)
    assert result.exit_code == expect, result.output
    return result.output


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_list_shows_what_is_where_and_what_a_resume_would_use(run: Path) -> None:
    (run / "step_00000030").rename(run / "damaged_step_00000030_2")
    (run / "step_00000033/trainer.json").write_text("cut")
    rows = json.loads(_said("list", "small", "--json"))["checkpoints"]
    assert [(row["name"], row["here"], row["mirror"], row["resume"]) for row in rows] == [
        ("step_00000033", True, False, False),
        ("step_00000020", True, True, True),
        ("step_00000010", True, True, False),
        ("damaged_step_00000030_2", True, False, False),
    ]
    assert "trainer.json has 3 bytes" in rows[0]["fault"]
    assert (rows[1]["ranks"], rows[1]["zero"], rows[3]["step"]) == (1, 1, 30)
    lines = _said("list", str(run.parent)).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [row["name"] for row in rows[:3]]
    assert lines[2].split()[-4:] == ["yes", "resumes", "from", "it"]
    assert lines[4].startswith("step_00000033: trainer.json has 3 bytes")
    assert lines[5].startswith("set aside: damaged_step_00000030_2")


def test_the_list_shows_what_is_foreign_and_what_has_another_steps_name(run: Path) -> None:
    (run / "step_00000020").rename(run / "step_00000040")
    (run / "step_latest").symlink_to(run / "step_00000030")
    (run / "damaged_step_old").mkdir()
    (run / "step_00000050").write_text("a file")
    (run / "step_00000030/notes").mkdir()
    found = json.loads(_said("list", "small", "--json"))
    assert found["foreign"] == ["damaged_step_old", "step_latest"]
    resumes = {row["name"]: row["resume"] for row in found["checkpoints"]}
    assert resumes == {f"step_000000{step}": step == 33 for step in (50, 40, 33, 30, 20, 10)}
    output = _said("list", "small")
    assert "ignored, because they are not checkpoints: damaged_step_old, step_latest" in output
    assert "step_00000040: it is of step 20; its name would be step_00000020" in output
    assert "step_00000040: damaged\n  it is of step 20" in _said("verify", "small", expect=1)
    _said("prune", "small", "--damaged", "--dry-run")


@pytest.mark.parametrize("text", ["[]", "3", '{"world": 1', "{}", "\0"])
def test_the_list_survives_any_trainer_file(run: Path, text: str) -> None:
    train_state = run / "step_00000033/trainer.json"
    train_state.write_text(text + " " * (train_state.stat().st_size - len(text)))
    assert json.loads(_said("list", "small", "--json"))["checkpoints"][0]["fault"].startswith("trainer.json")


def test_verify_reads_all_bytes_of_run_and_mirror(run: Path) -> None:
    assert "6 checkpoints, all intact" in _said("verify", "small")
    _flip(run / "step_00000020/state-00000-of-00001.safetensors")
    _flip(run / "step_00000020/trainer.json")
    _flip(Path("copies/small/step_00000010/trainer.json"))
    found = json.loads(_said("verify", "small", "--json", expect=1))
    assert {
        Path(where).absolute().relative_to(Path.cwd()).as_posix(): faults for where, faults in found.items() if faults
    } == {
        "runs/small/checkpoints/step_00000020": [
            "state-00000-of-00001.safetensors does not have the sha256 it was written with",
            "trainer.json does not have the sha256 it was written with",
        ],
        "copies/small/step_00000010": ["trainer.json does not have the sha256 it was written with"],
    }
    assert "6 checkpoints, 2 damaged" in _said("verify", "small", expect=1)


def _write(folder: Path, train_state: TrainState, *files: dict[str, Tensor]) -> Path:
    """Write a checkpoint of as many ranks as there are `files`."""
    folder.mkdir()
    names = [f"state-{rank:05d}-of-{len(files):05d}.safetensors" for rank in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        write_state(folder / name, tensors)
    (folder / "trainer.json").write_text(json.dumps(vars(train_state)))
    manifest.write(folder, [manifest.seal(folder / name) for name in (*names, "trainer.json")])
    return folder


def test_a_difference_is_found_whatever_the_layout(run: Path) -> None:
    a, b = FIRST["weight/a@0"], FIRST["weight/b@0"]
    parts = {"weight/a@0": a[:13], "weight/b@4": b[4:]}, {"weight/a@13": a[13:], "weight/b@0": b[:4]}
    changes = {"world": 2, "zero": 3, "updates": 20, "stream": {"at": 20}}
    averaged = parts[1] | {"ema/a@0": FIRST["ema/a@0"]}
    other = _write(run / "step_00000040", _train_state(40, **changes), parts[0], averaged)
    same = Pair(run / "step_00000020", other)
    assert all(each.same_bits and each.largest == each.relative == 0 for each in same.differences())
    assert same.settings() == {"step": (20, 40), "world": (1, 2), "zero": (1, 3)}
    assert same.only_in == [[], []]
    assert "all 3 tensors are bit-identical" in _said("diff", "small", "20", "40")

    parts[1]["weight/a@13"] = a[13:] + torch.eye(27)[5] * 0.5
    _write(run / "step_00000050", _train_state(50, **changes), *parts)
    found = json.loads(_said("diff", "small", "20", "50", "--json"))
    assert not found["bit_identical"]
    assert found["only_first"] == ["ema a [8, 5]"]
    rows = {row["parameter"]: row for row in found["tensors"]}
    assert (rows["a"]["largest"], rows["b"]["same_bits"]) == (0.5, True)
    assert rows["a"]["relative"] == pytest.approx(0.5 / float(a.norm()))


def test_a_long_tensor_is_compared_in_chunks(tmp_path: Path) -> None:
    long = torch.zeros(9_000_000)
    other = long.clone()
    other[[3, 8_999_999]] = torch.tensor([1.0, -2.0])
    other[5_000_000] = -0.0
    long[0] = 5.0
    other[0] = 5.0
    train_state = _train_state(1, shapes={"a": [9_000_000]})
    pair = Pair(*(_write(tmp_path / name, train_state, {"weight/a@0": t}) for name, t in (("a", long), ("b", other))))
    (found,) = pair.differences()
    assert (found.same_bits, found.largest, found.relative) == (False, 2.0, pytest.approx(1 / 5**0.5))


def test_damaged_checkpoints_are_not_compared(run: Path) -> None:
    _flip(run / "step_00000020/trainer.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact\n  step_00000020: trainer\.json"):
        _said("diff", "small", "20", "30")
    with pytest.raises(CheckpointError, match="no checkpoint of step 25; there are: step_00000033"):
        _said("diff", "small", "25", "30")


def test_pruning_leaves_the_newest_intact_one_and_the_one_to_roll_back_to(run: Path) -> None:
    before = _names(run)
    text = _said("prune", "small", "--keep", "1", "--keep-every", "20", "--dry-run")
    assert "step_00000010: " in text
    assert "1 would be removed" in text
    assert "3 checkpoints stay" in text
    assert _names(run) == before
    _flip(run / "step_00000033/trainer.json")
    _flip(run / "step_00000030/trainer.json")
    (run / "step_00000010").rename(run / "damaged_step_00000010")
    assert "0 removed" in _said("prune", "small", "--keep", "1")
    assert "1 removed" in _said("prune", "small", "--keep", "1", "--damaged")
    assert _names(run) == ["step_00000020", "step_00000030", "step_00000033"]


@pytest.mark.slow
def test_a_run_in_progress_can_be_listed_but_not_pruned(shell: Shell) -> None:
    how = ("steps=100000", "checkpoint.every=5", "--no-ray", "--workers", "2")
    process = shell.popen("launch", "small.yaml", *how)
    shell.reaches(process, "small", 12)
    assert "run folder runs/small is in use by a launch" in shell.run("checkpoints", "prune", "small", expect=2)
    assert "resumes from it" in shell.run("checkpoints", "list", "small")
    process.terminate()
    assert "stopped on request; the same command resumes from step_" in shell.finish(process, expect=3)
    assert "all intact" in shell.run("checkpoints", "verify", "small")
