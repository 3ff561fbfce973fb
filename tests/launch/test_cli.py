"""The command line: wrong input ends in one message and exit code 2, and short commands print what they should."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

import vimscale
from tests.support.shell import Shell, new_shell

LAUNCH = ("launch", "small.yaml", "--no-ray", "--workers", "1")


def _without_shard(shell: Shell) -> None:
    shell.run("data", "digits", "set")
    (shell.folder / "set/train/00003.tar").unlink()


def _runs_is_a_file(shell: Shell) -> None:
    (shell.folder / "runs").write_text("in the way")


def _another_recipe(shell: Shell) -> None:
    folder = shell.folder / "runs/small/checkpoints"
    folder.mkdir(parents=True)
    from vimscale.recipe import recipe

    changed = recipe.load(shell.folder / "small.yaml", ["optim.lr=5e-4"])
    (folder.parent / "recipe.yaml").write_text(changed.to_yaml())
    (folder.parent / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')


WRONG = {
    "an unknown key": ((*LAUNCH, "optim.lrr=1"), None, "optim.lrr: no such key; did you mean lr?"),
    "a wrong type": ((*LAUNCH, "batch=many"), None, "batch: 'many' is not a whole number"),
    "an unknown recipe": (("launch", "vim_digts_cpu"), None, "did you mean vim_digits_cpu?"),
    "a batch that micro-batches cannot divide": (
        (*LAUNCH, "batch=33", "parallel.micro_batch=2"),
        None,
        "batch 33 is not a multiple of parallel.micro_batch 2; use batch=32",
    ),
    "a batch that the ranks cannot divide": (
        ("launch", "small.yaml", "--no-ray", "--workers", "2", "batch=33"),
        None,
        "batch 33 is not a multiple of 2 ranks; use batch=32 or another number of --workers",
    ),
    "an image that is not a multiple of the patch": ((*LAUNCH, "model.image_size=30"), None, "use 24 or 32"),
    "an unknown kind of layer": (
        (*LAUNCH, "model.directions=bi by"),
        None,
        "'by' is not a kind of layer; known: fwd, bwd",
    ),
    "more layers than the depth": (
        (*LAUNCH, "model.directions=bi*3", "model.depth=2"),
        None,
        "the text names 3 layers, but depth is 2: this is layer 3\n      bi*3\n      ^",
    ),
    "a missing class token": (
        (*LAUNCH, "model.cls_token=none", "model.pool=cls"),
        None,
        "use cls_token: middle or pool: mean",
    ),
    "missing weights": ((*LAUNCH, "model.weights=nowhere"), None, "nowhere does not hold an exported model"),
    "a budget that cannot be met": (
        (*LAUNCH, "parallel.recompute=0.001MB"),
        None,
        "even with block in every layer",
    ),
    "a missing shard": ((*LAUNCH, "data.train=set/train"), _without_shard, "00003.tar is missing"),
    "a missing data set": ((*LAUNCH, "data.train=nowhere"), None, "data nowhere: nowhere is not there"),
    "an unwritable run folder": (LAUNCH, _runs_is_a_file, "cannot be written: Not a directory; choose another with"),
    "a read-only run folder": ((*LAUNCH, "--runs", "/proc/1"), None, "run folder /proc/1/small cannot be written"),
    "too many workers": (
        ("launch", "small.yaml", "--workers", "640"),
        None,
        "--workers 640: each rank takes one CPU and this machine has",
    ),
    "no workers": (("launch", "small.yaml", "--no-ray", "--workers", "0"), None, "--workers 0"),
    "a Ray address where nobody answers": (
        ("launch", "small.yaml", "--address", "127.0.0.1:9"),
        None,
        "--address 127.0.0.1:9: nothing answers there",
    ),
    "an invalid Ray address": (("launch", "small.yaml", "--address", "here"), None, "write HOST:PORT, or auto"),
    "processes and Ray at once": (
        ("launch", "small.yaml", "--no-ray", "--address", "auto"),
        None,
        "exclude each other",
    ),
    "a name that would leave its folder": ((*LAUNCH, "name=../other"), None, "cannot name a folder"),
    "a folder of another recipe": (LAUNCH, _another_recipe, "optim.lr: 0.0005 -> 0.001"),
    "a missing run": (("evaluate", "nothing"), None, "there are no runs under ./runs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_message_and_code_2(shell: Shell, case: str) -> None:
    arguments, prepare, expected = WRONG[case]
    if prepare is not None:
        prepare(shell)
    before = {path: path.stat().st_mtime_ns for path in shell.folder.rglob("*") if path.is_file()}
    output = shell.run(*arguments, expect=2)
    assert expected in output
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before, "an existing file was changed"


def test_the_address_of_another_server_is_refused(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        output = shell.run("launch", "small.yaml", "--address", address, expect=2, timeout=60)
    assert "what answers there is not a Ray" in output


def test_an_existing_data_set_is_not_overwritten(shell: Shell) -> None:
    shell.run("data", "digits", "set")
    assert "not empty; give a new folder" in shell.run("data", "digits", "set", expect=2)


def test_an_unwritable_cache_is_reported(shell: Shell) -> None:
    shell.env["XDG_CACHE_HOME"] = "/proc/1"
    assert "set XDG_CACHE_HOME to a writable folder" in shell.run(*LAUNCH, expect=2)


SHORT = ("launch", "small.yaml", "--no-ray", "--workers", "2", "data.train=set/train", "steps=10", "optim.lr=3e-4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Shell:
    """Return a finished run of 10 steps, which tests must not change, after a launch that was refused."""
    shell = new_shell(tmp_path_factory.mktemp("trained"), cache)
    shell.run("data", "digits", "set")
    shell.run(*SHORT, "batch=33", expect=2)
    shell.run(*SHORT)
    return shell


def test_a_refused_launch_does_not_affect_the_next_one(trained: Shell) -> None:
    assert len(trained.losses("small")) == 10


def test_a_folder_in_use_is_refused(shell: Shell) -> None:
    first = shell.popen(*LAUNCH, "steps=3000")
    while not shell.rows("small"):
        assert first.poll() is None
    output = shell.run(*LAUNCH, "steps=3000", expect=2)
    assert "is in use by a launch" in output
    first.terminate()
    shell.finish(first, expect=3)


def test_a_resumed_run_refuses_other_training_data(shell: Shell, trained: Shell) -> None:
    for name in ("set", "runs"):
        shutil.copytree(trained.folder / name, shell.folder / name)
    (shell.folder / "runs/small/result.json").unlink()
    manifest = shell.folder / "set/train/manifest.json"
    manifest.write_text(manifest.read_text().replace("digits-train", "digits-other"))
    output = shell.run(*SHORT, expect=2)
    assert "is not what the checkpoint of step 10 was trained on (manifests differ)" in output
    assert "Traceback" not in output


def test_recipes_are_listed_with_their_descriptions(shell: Shell) -> None:
    assert re.search(r"vim_digits_cpu +A small Vim on 1,797 real scans", shell.run("recipes"))


def test_show_prints_the_resolved_recipe_and_its_plan(shell: Shell) -> None:
    output = shell.run("show", "small.yaml", "optim.lr=3e-4", "parallel.micro_batch=4", "--workers", "2")
    assert "lr: 0.0003" in output
    assert re.search(r"micro-batch\s+4 images x 4 micro-steps on 2 ranks", output)
    assert re.search(r"parameters\s+[\d,]+", output)
    assert not (shell.folder / "runs").exists()


def test_the_schema_is_json(shell: Shell) -> None:
    assert json.loads(shell.run("schema"))["title"] == "Recipe"
    assert json.loads(shell.run("schema", "cluster"))["title"] == "Cluster"


def test_the_run_folder_records_what_ran_and_where(trained: Shell) -> None:
    folder = trained.folder / "runs/small"
    from vimscale.recipe import recipe

    assert recipe.load(folder / "recipe.yaml") == recipe.load(trained.folder / "small.yaml", SHORT[5:])
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["command"][-1] == "optim.lr=3e-4"
    assert json.loads((folder / "result.json").read_text())["images"] == 359
    assert list((folder / "tensorboard").glob("events.*"))
    row = trained.rows("small")[-1]
    assert {"step", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_gb"} <= row.keys()


def test_doctor_reports_what_will_run(shell: Shell) -> None:
    output = shell.run("doctor")
    assert re.search(r"will run\s+ok", output)


def test_help_names_every_command(shell: Shell) -> None:
    output = shell.run("--help")
    for command in ("recipes", "show", "schema", "launch", "evaluate", "export", "import", "data", "doctor"):
        assert re.search(rf"│ {command} ", output)


def test_the_version_is_printed(shell: Shell) -> None:
    assert shell.run("--version") == f"vimscale {vimscale.__version__}\n"


@pytest.mark.parametrize(("words", "expected"), [("vimscale feat", "features"), ("vimscale data st", "stats")])
def test_a_shell_completes_commands(shell: Shell, words: str, expected: str) -> None:
    shell.env |= {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_VIMSCALE_COMPLETE": "complete_bash"}
    assert shell.run().split() == [expected]


def test_the_completion_of_a_shell_can_be_printed(shell: Shell) -> None:
    shell.env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    assert "_VIMSCALE_COMPLETE=complete_bash" in shell.run("--show-completion", "bash")
