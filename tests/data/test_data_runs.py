"""Data in complete runs: mixtures, phases and mixing through kills, damaged sets, sets behind a web server."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.shell import EVERYTHING, Shell
from tests.support.web_server import WebServer
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import write_set

PROCESSES = ("--no-ray", "--workers", "2")
SHORT = (*EVERYTHING, "checkpoint.every=6", "steps=24")


def _launch(shell: Shell, name: str, *how: str) -> list[float]:
    shell.run("launch", "small.yaml", f"name={name}", *how)
    return shell.losses(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_every_option_ends_with_the_same_bits_after_a_kill_and_with_other_ranks(shell: Shell) -> None:
    undisturbed = _launch(shell, "whole", *SHORT, *PROCESSES)
    killed = shell.popen("launch", "small.yaml", "name=killed", *SHORT, *PROCESSES)
    while len(shell.rows("killed")) < 13:
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    shell.nothing_is_left()
    assert _launch(shell, "killed", *SHORT, *PROCESSES) == undisturbed
    alone = _launch(shell, "alone", *SHORT, "--no-ray", "--workers", "1")
    # fp32 sums in another order
    assert np.allclose(alone, undisturbed, rtol=1e-5)


@pytest.mark.slow
def test_images_of_several_shapes_are_packed_and_trained_on(shell: Shell) -> None:
    packed = ("model.image_size=64", "augment.buckets=5", "steps=8", "data.val=null")
    two = _launch(shell, "two", *packed, *PROCESSES)
    one = _launch(shell, "one", *packed, "--no-ray", "--workers", "1")
    assert np.allclose(one, two, rtol=1e-5), "fp32 sums in another order"


def _damaged(digits: Path, folder: Path, count: int) -> Path:
    """Write the digits with the first `count` images of every shard truncated, in intact tars."""
    source = Dataset.open(str(digits / "train"))
    samples = [source.read(shard, i) for shard, n in enumerate(source.counts) for i in range(n)]
    for number, sample in enumerate(samples):
        if number % 180 < count:
            sample["png"] = sample["png"][:60]
    original = source.manifest
    about = {"classes": original.classes, "mean": original.mean, "std": original.std, "source": "", "licence": ""}
    rows = [{"__key__": s["__key__"], "png": s["png"], "cls": int(s["cls"])} for s in samples]
    write_set(folder, rows, per_shard=180, name="damaged", **about)
    return folder


@pytest.mark.slow
def test_a_few_bad_images_are_replaced_and_counted(shell: Shell, digits: Path) -> None:
    folder = _damaged(digits, shell.folder / "set", 1)
    output = shell.run("launch", "small.yaml", f"data.train={folder}", "epochs=1", *PROCESSES)
    assert "8 of 1,440 images so far could not be used and were replaced (image: 8)" in output
    assert shell.rows("small")[-1]["bad_image"] == 8
    logs = "".join(path.read_text() for path in (shell.folder / "runs" / "small" / "logs").iterdir())
    assert "the image cannot be decoded" in logs + output


def test_too_many_bad_images_end_the_run_with_one_message(shell: Shell, digits: Path) -> None:
    folder = _damaged(digits, shell.folder / "set", 40)
    output = shell.run("launch", "small.yaml", f"data.train={folder}", *PROCESSES, expect=2)
    assert "more than data.max_bad 0.01 allows" in output
    assert "vimscale data repair" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_shard_damaged_during_the_run_is_named_with_its_offset(shell: Shell, digits: Path) -> None:
    shutil.copytree(digits / "train", shell.folder / "set")
    tar = shell.folder / "set" / "00002.tar"
    offset = int(np.fromfile(f"{tar}.idx", "<u8")[7])
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 512)
    output = shell.run("launch", "small.yaml", "data.train=set", "data.workers=1", *PROCESSES, expect=2)
    assert f"00002.tar, offset {offset}: no sample there" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_behind_a_web_server_that_dies_and_comes_back_has_the_same_losses(shell: Shell, digits: Path) -> None:
    windows = ("data.window=1", "steps=60")
    at_home = _launch(shell, "home", *windows, *PROCESSES)
    server = WebServer(digits)
    # a cache of two shards of 0.46 MB, so that the network is needed all the time
    shell.env["VIMSCALE_CACHE"] = str(shell.folder / "shards")
    away = ("name=away", f"data.train={server.url}/train", "data.cache=1MB", *windows)
    run = shell.popen("launch", "small.yaml", *away, *PROCESSES)
    while len(shell.rows("away")) < 10:
        assert run.poll() is None
    server.shutdown()
    server.server_close()
    server = WebServer(digits, server.server_port)
    shell.finish(run)
    server.shutdown()
    server.server_close()
    assert shell.losses("away") == at_home
    assert sum(server.count(".tar").values()) > 8, "shards were fetched after the restart"
    logged = [row for row in shell.rows("away") if "cache_hits" in row]
    assert max(row["fetched_mb_per_s"] for row in logged) > 0
    assert min(row["cache_hits"] for row in logged) < 1


@pytest.mark.slow
def test_data_order_prints_the_same_samples_for_any_world(shell: Shell) -> None:
    def order(*how: str) -> list[str]:
        output = shell.run("data", "order", "small.yaml", *SHORT, "--from", "13", "--steps", "3", *how)
        return [line for line in output.splitlines() if "\t" in line]  # stderr may hold messages of Python itself

    title, *alone = order("--world", "1", "--rank", "0")
    assert title.split() == ["step", "epoch", "position", "shard", "key", "pixels"]
    assert len(alone) == 64 + 64 + 32
    ranks = [order("--world", "4", "--rank", str(rank), "--workers", "2")[1:] for rank in range(4)]
    assert sorted(line for rank in ranks for line in rank) == sorted(alone)
    assert "rank 4" in shell.run("data", "order", "small.yaml", "--world", "4", "--rank", "4", expect=2)
