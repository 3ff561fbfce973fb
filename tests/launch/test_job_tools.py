"""Every job command reports a cluster tool that is missing or fails; none takes it for an empty list of jobs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vimscale.errors import LaunchError
from vimscale.launch import cluster
from vimscale.launch.commands import app
from vimscale.launch.jobs import backend as jobs

runner = CliRunner()
COMMANDS = (
    ["jobs"],
    ["logs", "small", "--follow"],
    ["stop", "small"],
    ["resume", "small"],
    ["submit", "vim_digits_cpu"],
)
TOOLS = {"slurm": "squeue", "kuberay_h100": "kubectl"}


def _tool(text: str, mode: int = 0o755) -> Callable[[Path, str], None]:
    def make(folder: Path, name: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(mode)

    return make


BROKEN = {
    "missing": (lambda folder, name: None, "there is no {tool} here"),
    "not executable": (_tool("#!/bin/sh\n", 0o644), "{tool} cannot be run: Permission denied"),
    "of another machine": (_tool("\x7fELF what"), "{tool} cannot be run: Exec format error"),
    "failing": (_tool("#!/bin/sh\necho 'connect refused' >&2\nexit 1\n"), "said: connect refused"),
    "silent": (_tool("#!/bin/sh\nexit 3\n"), "said: exit code 3"),
    "talking": (_tool("#!/bin/sh\necho welcome to \xff\n"), "answer: 'welcome to "),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("backend", TOOLS)
def test_a_tool_that_does_not_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, case: str
) -> None:
    make, says = BROKEN[case]
    (tmp_path / "bin").mkdir()
    make(tmp_path / "bin", TOOLS[backend])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    job = tmp_path / "runs/small/job"
    job.mkdir(parents=True)
    (job / "id").write_text("7\n")
    (job / "script").write_text(f"<< 'END_OF_RECIPE'\n{_recipe()}END_OF_RECIPE\n")
    for runs in (tmp_path / "runs", tmp_path / "none"):  # with a known job, and without
        for command in COMMANDS:
            if runs.name == "none" and command[0] not in ("jobs", "submit"):
                continue
            data = ["data.train=/a", "data.val=/b"] if command[0] == "submit" else []
            if case == "talking" and command[0] == "submit" and backend != "slurm":
                continue  # for its first call only the exit code counts
            done = runner.invoke(app.app, [*command, "--on", backend, "--with", f"runs={runs}", *data])
            assert isinstance(done.exception, LaunchError), (command, done.output, done.exception)
            assert says.format(tool=TOOLS[backend]) in str(done.exception)
    assert not (tmp_path / "none").exists()


def _recipe() -> str:
    from vimscale.recipe import recipe

    return recipe.load("vim_digits_cpu", ["name=small", "data.train=/a", "data.val=/b"]).to_yaml()


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_folder_of_runs_that_cannot_be_read_is_an_error(tmp_path: Path, backend: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"file cannot be read: Not a directory; is `runs` in the cluster file right"):
        jobs.open_backend(cluster.load(backend, [f"runs={tmp_path}/file"])).jobs()


def test_a_damaged_record_of_a_local_job_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "small/job"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"pid": 1')
    with pytest.raises(LaunchError, match=r"job\.json cannot be read: .*; remove it to forget the job"):
        jobs.open_backend(cluster.load("local", [f"runs={tmp_path}"])).jobs()


def test_logs_that_kubectl_may_not_read_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = '{"metadata": {"name": "p", "creationTimestamp": "1"}, "status": {"phase": "Running"}}'
    item = '{"kind": "ConfigMap", "metadata": {"annotations": {"vimscale/run": "x"}, "creationTimestamp": "1"}}'
    _tool(
        f"""#!/bin/sh
case "$*" in
    *" logs "*) echo 'Error from server (Forbidden): pods "p" is forbidden' >&2; exit 1 ;;
    *"get pods"*) echo '{{"items": [{pod}]}}' ;;
    *) echo '{{"items": [{item}]}}' ;;
esac
"""
    )(tmp_path, "kubectl")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    with pytest.raises(LaunchError, match=r'kubectl logs said: Error from server \(Forbidden\): pods "p" is forbidden'):
        list(jobs.open_backend(cluster.load("kuberay_h100")).logs("x", follow=False))
