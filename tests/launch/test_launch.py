"""`vimscale launch` as a user runs it: real processes, real Ray, real DeepSpeed, real kills."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import checkpoints
from tests.support.processes import is_running
from tests.support.ray_head import ray_head
from tests.support.shell import Shell, new_shell, relative_difference
from vimscale.launch.processes.rank import Ending
from vimscale.launch.supervise.failures import first_cause
from vimscale.runtime import manifest, run_folder

RAY = ("--workers", "2")
PROCESSES = ("--workers", "2", "--no-ray")
ALL_LAYOUTS = [(1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2)]
"""(ZeRO stage, ranks), but for stage 0 on one rank."""


Runs = Callable[..., Shell]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Runs:
    """Return finished runs of 50 steps by ZeRO stage, ranks and arguments. Tests must not change them."""
    done: dict[tuple[object, ...], Shell] = {}

    def run(zero: int, world: int, *how: str) -> Shell:
        if (zero, world, how) not in done:
            shell = done[zero, world, how] = new_shell(tmp_path_factory.mktemp("run"), cache)
            changes = (f"parallel.zero={zero}", "checkpoint.every=10", "checkpoint.keep=2")
            shell.run("launch", "small.yaml", *changes, "--workers", str(world), *how)
        return done[zero, world, how]

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("how", "layouts"),
    [
        pytest.param(("--no-ray",), ALL_LAYOUTS, id="processes"),
        pytest.param((), ALL_LAYOUTS, id="ray"),
    ],
)
def test_losses_are_the_same_at_every_zero_stage_and_world_size(
    runs: Runs, how: tuple[str, ...], layouts: list[tuple[int, int]]
) -> None:
    def losses(zero: int, world: int) -> list[float]:
        return runs(zero, world, *how).losses("small")

    plain = losses(0, 1)
    assert plain[-1] < plain[0] * 0.9
    for zero, world in layouts:
        # fp32 sums in another order
        assert relative_difference(losses(zero, world), plain) < 1e-5, f"ZeRO-{zero} on {world} ranks"


DYNAMIC = (
    "model.depth=5",
    "model.directions=bi shared pair*2 bi@column",
    "model.backward_gate=true",
    "model.backward_drop=0.3",
    "model.backward_ramp=[3, 12]",
    "model.registers=2",
    "optim.backward_lr=0.5",
    "optim.gate_decay=0.5",
    "steps=16",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_changing_directions_give_the_same_losses_at_every_stage_and_level_of_recomputation(shell: Shell) -> None:
    def losses(name: str, *how: str, world: int) -> list[float]:
        shell.run("launch", "small.yaml", f"name={name}", *DYNAMIC, *how, "--no-ray", "--workers", str(world))
        return shell.losses(name)

    plain = losses("dynamic", "parallel.zero=0", world=1)
    stage3 = ("parallel.zero=3", "parallel.persist=0")
    for how, world in (
        (("parallel.zero=1",), 2),
        (stage3, 2),
        ((*stage3, "parallel.recompute=block"), 2),
        ((*stage3, "parallel.recompute=scan"), 1),
    ):
        # fp32 sums in another order
        assert relative_difference(losses("-".join(how).replace("=", "_"), *how, world=world), plain) < 1e-5, how
    layers = shell.rows("dynamic", "layers")
    assert [row["step"] for row in layers] == [5, 10, 15]
    assert all(gate < 1 for gate in layers[-1]["gate"] if gate is not None), "their decay is half of all per step"


@pytest.mark.slow  # a faster test compares an interrupted run under Ray with plain processes
def test_ray_and_plain_processes_give_the_same_bits(shell: Shell) -> None:
    shell.run("launch", "small.yaml", "name=ray", *RAY)
    shell.run("launch", "small.yaml", "name=processes", *PROCESSES)
    assert shell.losses("ray") == shell.losses("processes")
    assert checkpoints.equal(checkpoints.tensors(shell, "ray"), checkpoints.tensors(shell, "processes"))


@pytest.mark.slow
def test_accumulation_changes_only_the_order_of_sums(shell: Shell) -> None:
    shell.run("launch", "small.yaml", "name=whole", *PROCESSES)
    shell.run("launch", "small.yaml", "name=parts", "parallel.micro_batch=4", *PROCESSES)
    assert relative_difference(shell.losses("parts"), shell.losses("whole")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_bf16_trains_with_fp32_parameters(shell: Shell, runs: Runs, zero: int) -> None:
    exact = runs(zero, 2, "--no-ray").losses("small")
    shell.run("launch", "small.yaml", "name=bf16", f"parallel.zero={zero}", "parallel.precision=bf16", *PROCESSES)
    off = relative_difference(shell.losses("bf16"), exact)
    assert 0 < off < 0.05, "rounding is visible, and stays small over 50 steps"
    assert {value.dtype for value in checkpoints.tensors(shell, "bf16").values()} == {torch.float32}


LONG = ("steps=60", "checkpoint.every=20", "checkpoint.keep=2", "log.every=10")


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Shell:
    """Return an undisturbed run of 60 steps; Ray gives the same bits, see above."""
    shell = new_shell(tmp_path_factory.mktemp("calm"), cache)
    shell.run("launch", "small.yaml", *LONG, *PROCESSES)
    return shell


def _same_bits_as(calm: Shell, shell: Shell, name: str) -> bool:
    """Return whether the run ended with the losses, weights and moving averages of the calm one, bit for bit."""
    same = checkpoints.equal(checkpoints.tensors(shell, name), checkpoints.tensors(calm, "small"))
    return same and shell.losses(name) == calm.losses("small")


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        pytest.param(PROCESSES, 1, id="processes-1"),
        pytest.param(PROCESSES, 0, id="processes-0", marks=pytest.mark.slow),
        pytest.param(RAY, 1, id="ray-1", marks=pytest.mark.slow),
        pytest.param(RAY, 0, id="ray-0", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_is_recovered_bit_exactly(shell: Shell, calm: Shell, how: tuple[str, ...], rank: int) -> None:
    process = shell.popen("launch", "small.yaml", "name=hit", *LONG, *how)
    shell.reaches(process, "hit", 30)
    os.kill(shell.process_of("hit", rank), signal.SIGKILL)
    output = shell.finish(process)
    assert re.search(rf"rank {rank}: process \d+ (was killed by SIGKILL|died); restarting from the last", output)
    assert "Traceback" not in output
    assert _same_bits_as(calm, shell, "hit")


@pytest.mark.parametrize(
    "how", [pytest.param(RAY, id="ray", marks=pytest.mark.slow), pytest.param(PROCESSES, id="processes")]
)
def test_an_interrupted_run_resumes_bit_exactly(shell: Shell, calm: Shell, how: tuple[str, ...]) -> None:
    process = shell.popen("launch", "small.yaml", "name=hit", *LONG, *how)
    shell.reaches(process, "hit", 30)
    os.killpg(process.pid, signal.SIGINT)  # a Ctrl-C reaches the entire process group
    output = shell.finish(process, expect=3)
    assert "stopped on request; the same command resumes from step_" in output
    stopped = len(shell.rows("hit"))
    assert 30 <= stopped < 60
    assert run_folder.checkpoints(shell.folder / "runs/hit/checkpoints")[0].name == run_folder.checkpoint_name(stopped)

    output = shell.run("launch", "small.yaml", "name=hit", *LONG, *how)
    assert f"resumed from {shell.folder}/runs/hit/checkpoints/{run_folder.checkpoint_name(stopped)}" in output
    assert _same_bits_as(calm, shell, "hit")

    output = shell.run("launch", "small.yaml", "name=hit", *LONG, *how)
    assert "runs/hit is finished: 60 steps, top-1" in output


@pytest.mark.slow  # test_faults kills them too
@pytest.mark.parametrize("how", [PROCESSES, RAY], ids=["processes", "ray"])
def test_a_killed_launcher_leaves_no_rank_running_and_the_command_resumes(
    shell: Shell, calm: Shell, how: tuple[str, ...]
) -> None:
    process = shell.popen("launch", "small.yaml", "name=hit", *LONG, *how)
    shell.reaches(process, "hit", 30)
    ranks = [shell.process_of("hit", rank) for rank in (0, 1)]
    process.kill()
    while any(is_running(pid) for pid in ranks):
        time.sleep(0.01)
    assert "resumed from" in shell.run("launch", "small.yaml", "name=hit", *LONG, *how)
    assert _same_bits_as(calm, shell, "hit")


def test_a_run_resumes_at_another_world_size_and_stage(shell: Shell, calm: Shell) -> None:
    process = shell.popen("launch", "small.yaml", "parallel.zero=2", *LONG, *PROCESSES)
    shell.reaches(process, "small", 15)
    process.send_signal(signal.SIGTERM)
    shell.finish(process, expect=3)
    assert len(shell.rows("small")) < 60
    shell.run("launch", "small.yaml", "parallel.zero=3", *LONG, "--no-ray", "--workers", "1")
    _agree((shell, "small"), (calm, "small"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_resumes_at_another_world_size_stage_and_context(shell: Shell) -> None:
    layouts = [(1, "2", 2), (3, "1", 1), (3, "2", 2), (2, "2", 1), (0, "1", 1), (1, "2", 2)]
    options = ("steps=120", "checkpoint.every=40", "log.every=10")
    shell.run("launch", "small.yaml", "name=calm", *options, *PROCESSES)
    for number, (zero, world, context) in enumerate(layouts):
        how = (f"parallel.zero={zero}", f"parallel.context={context}", "--no-ray", "--workers", world)
        process = shell.popen("launch", "small.yaml", "name=moved", *options, *how)
        if number < len(layouts) - 1:
            shell.reaches(process, "moved", len(shell.rows("moved")) + 5)
            process.send_signal(signal.SIGTERM)
            shell.finish(process, expect=3)
            assert len(shell.rows("moved")) < 120
        else:
            shell.finish(process)
    _agree((shell, "moved"), (shell, "calm"))


def _agree(*runs: tuple[Shell, str]) -> None:
    """Fail unless two runs have the same losses and evaluation but for sums in another order."""
    ours, theirs = (shell.losses(name) for shell, name in runs)
    assert relative_difference(ours, theirs) < 1e-5
    ours, theirs = (shell.rows(name, "eval")[-1] for shell, name in runs)
    assert ours["top1"] == theirs["top1"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_evaluation_and_export_agree_with_the_run_at_every_stage(shell: Shell, zero: int) -> None:
    shell.run("launch", "small.yaml", f"parallel.zero={zero}", "evaluate.every=20", *PROCESSES)
    during = shell.rows("small", "eval")
    assert [row["step"] for row in during] == [20, 40, 50]
    output = shell.run("evaluate", "small")
    assert f"step 50: top-1 {during[-1]['top1']:.2%}" in output
    assert f"loss {during[-1]['loss']:.4f}" in output
    raw = shell.run("evaluate", "small", "--raw")
    assert f"loss {during[-1]['loss']:.4f}" not in raw, "the moving average is not the weights"

    train_state = shell.folder / "runs/small/checkpoints/step_00000050/trainer.json"
    assert json.loads(train_state.read_text())["training_set"]["classes"] == [str(i) for i in range(10)]
    output = shell.run("export", "small", "--to", "safetensors")
    assert "loaded again, it gives the same logits" in output
    from vimscale.export import safetensors

    model = safetensors.load(shell.folder / "runs/small/export")
    kept = {k.removeprefix("ema/"): v for k, v in checkpoints.tensors(shell, "small").items() if k.startswith("ema/")}
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    config = json.loads((shell.folder / "runs/small/export/config.json").read_text())
    assert (config["about"]["step"], config["classes"]) == (50, [str(i) for i in range(10)])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_evaluation_does_not_change_training(shell: Shell, zero: int) -> None:
    changes = ("steps=8", "log.every=1", f"parallel.zero={zero}", "parallel.persist=0")
    shell.run("launch", "small.yaml", "name=unseen", *changes, *PROCESSES)
    shell.run("launch", "small.yaml", "name=seen", "evaluate.every=3", *changes, *PROCESSES)
    assert len(shell.rows("seen", "eval")) == 3
    assert shell.losses("seen") == shell.losses("unseen")


def test_only_the_newest_checkpoints_are_kept_and_each_is_whole(calm: Shell) -> None:
    left = run_folder.checkpoints(calm.folder / "runs/small/checkpoints")
    assert [path.name for path in left] == ["step_00000060", "step_00000040"]
    assert [manifest.damage(path) for path in left] == [None, None]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(shell: Shell, calm: Shell) -> None:
    folder = shell.folder / "runs/small"
    shutil.copytree(calm.folder / "runs/small", folder)
    (folder / "result.json").unlink()
    _flip_a_bit(next((folder / "checkpoints/step_00000060").glob("*.safetensors")))
    output = shell.run("launch", "small.yaml", *LONG, *PROCESSES)
    assert "step_00000060 is damaged and set aside as damaged_step_00000060" in output
    assert re.search(r"resumed from .*step_00000040", output)
    assert (folder / "checkpoints/damaged_step_00000060").is_dir()
    assert _same_bits_as(calm, shell, "small")


@pytest.mark.slow
def test_a_run_without_any_whole_checkpoint_stops_and_loses_nothing(shell: Shell) -> None:
    shell.run("launch", "small.yaml", "checkpoint.every=50", *PROCESSES)
    folder = shell.folder / "runs/small"
    (folder / "result.json").unlink()
    _flip_a_bit(folder / "checkpoints/step_00000050/trainer.json")
    output = shell.run("evaluate", "small", expect=2)
    assert "no checkpoint is intact" in output
    output = shell.run("launch", "small.yaml", "checkpoint.every=50", *PROCESSES, expect=2)
    assert "trainer.json does not have the sha256 it was written with" in output
    assert "Traceback" not in output
    assert (folder / "checkpoints/damaged_step_00000050/trainer.json").exists()


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_no_other(shell: Shell, calm: Shell) -> None:
    checkpoints = shell.folder / "runs/small/checkpoints"
    shutil.copytree(calm.folder / "runs/small", checkpoints.parent)
    (checkpoints.parent / "result.json").unlink()
    shutil.rmtree(checkpoints / "step_00000060")
    rows = (checkpoints.parent / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    before = sum(len(row) for row in rows if json.loads(row)["step"] <= 40)
    # the last metrics cannot be written either, which does not end the run
    process = shell.popen("launch", "small.yaml", *LONG, *PROCESSES, file_limit=before // 1024 + 1)
    output = shell.finish(process, expect=1)
    assert "metrics.jsonl could not be written: File too large; tried again with each row" in output
    assert re.search(r"checkpoint .*step_00000060 could not be written: .*; earlier checkpoints are untouched", output)
    assert "Traceback" not in output
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000040"]
    shell.run("launch", "small.yaml", *LONG, *PROCESSES)
    assert _same_bits_as(calm, shell, "small")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(shell: Shell) -> None:
    changes = ("optim.lr=1e30", "optim.warmup=0", "optim.clip=null", "checkpoint.every=1000")
    output = shell.run("launch", "small.yaml", *changes, *PROCESSES, expect=1)
    assert re.search(r"step \d+: loss (nan|inf)|gradient norm (nan|inf)", output)
    assert "Lower optim.lr" in output
    assert "Traceback" not in output
    assert run_folder.checkpoints(shell.folder / "runs/small/checkpoints") == []


def test_the_first_cause_is_reported_not_the_last() -> None:
    lost = Ending(0, "failed", cause="lost", message="Connection closed by peer", time=1.0)
    bug = Ending(1, "failed", cause="error", message="ValueError: 3", time=2.0)
    late_bug = Ending(2, "failed", cause="error", message="ValueError: 4", time=3.0)
    died = Ending(3, "failed", cause="died", message="killed", time=4.0)
    assert first_cause([lost, late_bug, bug]) is bug
    assert first_cause([lost, bug, died]) is died


def test_an_existing_ray_is_used_and_left_running(shell: Shell) -> None:
    with ray_head(shell, "--include-dashboard=false") as head:
        address = ("--address", f"127.0.0.1:{head.gcs}")
        output = shell.run("launch", "small.yaml", "steps=10", *address)
        assert "2 ranks on the Ray at" in output
        assert re.search(r"evaluation at step \d+: top-1 \S+  top-5 \S+  loss \S+  \(359 images\)", output)
        assert head.process.poll() is None
        refused = ("launch", "small.yaml", "name=more", "batch=36", *address, "--workers", "3")
        assert "each rank takes one CPU and the Ray cluster has 2" in shell.run(*refused, expect=2)
