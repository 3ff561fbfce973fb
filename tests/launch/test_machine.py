"""What must not depend on the machine: temporary folders, shared memory, inherited environment variables."""

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.shell import Shell
from vimscale.errors import LaunchError
from vimscale.launch.processes import temporary
from vimscale.launch.processes.ray_connection import RAY_SOCKETS

FOREIGN = {
    # set by MPI, torchrun or Slurm jobs that the launcher may run in
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "LOCAL_SIZE": "",
    "PMI_RANK": "3",
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "16",
    "MASTER_ADDR": "10.0.0.9",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "AZUREML_EXPERIMENT_ID": "1",
    "OMP_NUM_THREADS": "64",
    "NUMBA_NUM_THREADS": "1",
    # the address of a Ray that no longer exists
    "RAY_ADDRESS": "10.0.0.9:6379",
}


@pytest.fixture
def long_tmpdir() -> "Path":
    """A scratch folder whose path leaves no room for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="s")) / ("scratch-of-a-job-" * 5)
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--no-ray",), ()], ids=["processes", "ray"])
def test_a_launch_in_a_foreign_job_with_a_long_tmpdir_trains_and_leaves_nothing(
    shell: Shell, long_tmpdir: Path, how: tuple[str, ...]
) -> None:
    shell.env |= {**FOREIGN, "TMPDIR": str(long_tmpdir)}
    shell.run("launch", "small.yaml", "steps=6", "data.workers=1", "--workers", "2", *how)
    assert len(shell.losses("small")) == 6
    assert list(long_tmpdir.iterdir()) == []


@pytest.mark.slow
def test_commands_with_data_workers_run_below_a_long_tmpdir(shell: Shell, long_tmpdir: Path) -> None:
    shell.env["TMPDIR"] = str(long_tmpdir)
    one, two = (shell.finish(shell.popen("data", "order", "small.yaml", "--workers", n)) for n in ("0", "2"))
    assert one == two


def test_private_folders_leave_room_for_sockets_and_are_closed_to_others(
    long_tmpdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(long_tmpdir))
    made = Path(temporary.private_folder("vimscale-ray-", RAY_SOCKETS))
    assert made.parent in (Path("/tmp"), Path("/var/tmp"))
    assert len(os.fsencode(made)) + RAY_SOCKETS <= 107
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.rmdir()
    # TMPDIR is used as long as it leaves room
    short = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    assert Path(temporary.private_folder("v-", temporary.SOCKETS)).parent == short


def test_no_folder_for_temporary_files_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/x")
    with pytest.raises(
        LaunchError, match=r"^no folder .*: /x: No such file .*; /tmp has 4 bytes; .*set TMPDIR to a wri"
    ):
        temporary.private_folder("v-", 94)


def _small_shm(size: str) -> tuple[str, ...]:
    """Return the words before a command that run it in a mount namespace with this much shared memory."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    inside = ("unshare", "--mount", "sh", "-c", script, "small-shm")
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a /dev/shm of another size")
    return inside


@pytest.mark.slow
def test_shared_memory_that_is_too_small_for_data_workers_ends_the_run_in_one_message(shell: Shell) -> None:
    changes = ("data.workers=2", "batch=512", "model.image_size=64")
    inside = _small_shm("1m")
    process = shell.popen("launch", "small.yaml", *changes, "--workers", "1", "--no-ray", inside=inside)
    output = shell.finish(process, expect=2)
    assert "error: /dev/shm is full: a batch takes 6.3 MB" in output
    assert "set data.workers=0" in output
    order = shell.finish(shell.popen("data", "order", "small.yaml", *changes, inside=inside), expect=2)
    assert "error: /dev/shm is full" in order


@pytest.mark.slow
def test_a_small_shared_memory_is_enough_without_data_workers(shell: Shell) -> None:
    process = shell.popen("launch", "small.yaml", "steps=6", "--workers", "1", inside=_small_shm("64m"))
    shell.finish(process)
    assert len(shell.losses("small")) == 6
