"""The node's cache of shards: its size, several processes and sets, killed downloads, and prefetching."""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.noise import (
    BYTES,
    HASTY,
    ROOT,
    SAMPLE,
    SAMPLES,
    SHARDS,
    TWO_SHARDS,
    everything,
    moved,
    overwrite,
    resized,
    write_set,
)
from tests.support.web_server import WebServer, hang
from vimscale.data.dataset import Dataset
from vimscale.data.shards.cache import local_copy
from vimscale.data.stream import evaluation
from vimscale.errors import DataError

# ---- size


def test_a_cache_of_two_shards_serves_an_epoch_and_stays_within_its_size(
    server: WebServer, shards_cache: Path, expected: list
) -> None:
    dataset = Dataset.open(f"{server.url}/train", cache=TWO_SHARDS)
    assert everything(dataset) == expected
    assert dataset.traffic.misses > SHARDS
    assert sum(path.stat().st_size for path in shards_cache.iterdir()) <= 190_000
    assert len(list(shards_cache.glob("*.tar"))) == 2


def test_the_least_recently_used_shard_is_evicted(server: WebServer) -> None:
    def paths(*numbers: int) -> None:
        for number in numbers:
            Dataset.open(f"{server.url}/train", cache=TWO_SHARDS).path(number)

    paths(0, 1, 0, 2)
    server.requests.clear()
    paths(0, 2)
    assert not server.count(".tar")
    paths(1)
    assert server.count(".tar") == {"train/00001.tar": 1}


# ---- several processes and sets

READER = """
import sys
from vimscale.data.dataset import Dataset
dataset = Dataset.open(sys.argv[1])
print("open", flush=True)
for number in map(int, sys.argv[2:]):
    dataset.path(number)
"""


def _reader(url: str, *numbers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", READER, url, *map(str, numbers)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)


def test_processes_of_a_node_download_a_shard_once(server: WebServer, expected: list) -> None:
    readers = [_reader(f"{server.url}/train", *range(SHARDS)) for _ in range(2)]
    for reader in readers:
        reader.communicate()
        assert reader.returncode == 0
    assert server.count(".tar") == {f"train/{n:05d}.tar": 1 for n in range(SHARDS)}
    assert everything(Dataset.open(f"{server.url}/train")) == expected


def test_a_reader_that_waits_for_a_shard_gets_it_once_complete_while_others_keep_it_open(server: WebServer) -> None:
    server.faults["train/00000.tar"] = [hang(50_000)]
    datasets = [Dataset.open(f"{server.url}/train") for _ in range(2)]
    readers = [threading.Thread(target=dataset.read, args=(0, 0)) for dataset in datasets]
    readers[0].start()
    assert server.hanging.wait(60)
    readers[1].start()
    while _open_parts() < 2:
        time.sleep(0.001)
    server.resume.set()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert server.count(".tar") == {"train/00000.tar": 1}
    assert [dataset.traffic.misses for dataset in datasets] == [1, 1]


def _open_parts() -> int:
    """Count this process's descriptors of shards that are being downloaded."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").endswith(".part")
    return count


def test_killing_a_download_does_not_affect_other_processes(
    server: WebServer, shards_cache: Path, expected: list
) -> None:
    server.faults["train/00000.tar"] = [hang(50_000)]
    first = _reader(f"{server.url}/train", 0)
    assert server.hanging.wait(60)
    second = _reader(f"{server.url}/train", 0)
    assert second.stdout is not None
    second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second.communicate()
    assert second.returncode == 0
    assert server.count("0.tar") == {"train/00000.tar": 2}
    assert everything(Dataset.open(f"{server.url}/train")) == expected
    assert not list(shards_cache.glob("*.part"))


@pytest.mark.parametrize("number", [0, 1])
def test_leftovers_of_a_dead_download_are_removed(server: WebServer, shards_cache: Path, number: int) -> None:
    server.faults["train/00000.tar"] = [hang(50_000)]
    reader = _reader(f"{server.url}/train", 0)
    assert server.hanging.wait(60)
    reader.kill()
    reader.communicate()
    assert list(shards_cache.glob("*.part"))
    (shards_cache / "dead.tar.idx").touch()
    Dataset.open(f"{server.url}/train", cache="0.1MB").read(number, 0)
    assert sorted(path.suffix for path in shards_cache.iterdir()) == ["", ".idx", ".tar"]


def test_a_download_waits_for_room_that_another_download_takes(server: WebServer) -> None:
    server.faults["train/00000.tar"] = [hang(50_000)]
    dataset = Dataset.open(f"{server.url}/train", cache="0.1MB")
    slow = threading.Thread(target=dataset.path, args=(0,))
    slow.start()
    assert server.hanging.wait(60)
    waiting = threading.Thread(target=dataset.path, args=(1,))
    waiting.start()
    server.resume.set()
    slow.join()
    waiting.join()
    assert server.count(".tar") == {"train/00000.tar": 1, "train/00001.tar": 1}


def test_sets_whose_shards_have_the_same_names_are_kept_apart(
    tmp_path: Path, server: WebServer, expected: list
) -> None:
    other = everything(Dataset.open(str(write_set(tmp_path / "site" / "other", seed=7))))
    assert other != expected
    for _ in range(2):
        assert everything(Dataset.open(f"{server.url}/other")) == other
        assert everything(Dataset.open(f"{server.url}/train")) == expected


def test_a_shard_larger_than_the_cache_is_refused(server: WebServer) -> None:
    dataset = Dataset.open(f"{server.url}/train", cache="0.05MB")
    with pytest.raises(DataError, match=r"00000.tar has 92,160 bytes and the cache holds 50,000; enlarge data.cache"):
        dataset.read(0, 0)
    assert not server.count(".tar")


def test_a_disk_without_room_and_a_folder_that_cannot_be_written_are_named(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import resource
from vimscale.data.dataset import Dataset
from vimscale.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    Dataset.open("{server.url}/train").path(0)
except DataError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no room for" in done.stdout, done
    assert str(tmp_path / "shards") in done.stdout

    (tmp_path / "file").touch()
    monkeypatch.setenv("VIMSCALE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"cannot be cached .*Not a directory.* set VIMSCALE_CACHE to another folder"):
        Dataset.open(f"{server.url}/train").read(0, 0)


def test_a_damaged_file_in_the_cache_is_fetched_again(server: WebServer, shards_cache: Path) -> None:
    path = Dataset.open(f"{server.url}/train").path(0)
    assert path.parent == shards_cache
    os.truncate(path, 1000)
    assert Dataset.open(f"{server.url}/train").read(0, 0)["__key__"] == "0-0"
    assert path.stat().st_size == BYTES


def _no_bytes(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("suffix", "harm"),
    [
        (".tar", overwrite(0, b"\xff" * 512)),
        (".tar", overwrite(SAMPLE * 3, b"\0" * 4096)),
        (".tar", overwrite(SAMPLE * SAMPLES, b"more")),
        (".tar.idx", _no_bytes),
        (".tar.idx", resized(24)),
        (".tar.idx", overwrite(8, b"\xff" * 8)),
        (".tar.idx", moved(3, 512)),
        (".tar.idx", Path.unlink),
    ],
)
def test_any_damage_in_the_cache_is_fetched_again_by_the_reader_that_finds_it(
    server: WebServer, shards_cache: Path, expected: list, suffix: str, harm: Callable[[Path], None]
) -> None:
    path = Dataset.open(f"{server.url}/train").path(0)
    harm(path.with_suffix(suffix))
    assert everything(Dataset.open(f"{server.url}/train")) == expected
    assert path.read_bytes() == (server.root / "train/00000.tar").read_bytes()
    assert path.with_suffix(".tar.idx").read_bytes() == (server.root / "train/00000.tar.idx").read_bytes()
    assert server.count("00000.tar") == {"train/00000.tar": 2}


def test_a_process_that_has_the_damaged_copy_open_reads_the_new_one(server: WebServer, expected: list) -> None:
    one, other = (Dataset.open(f"{server.url}/train") for _ in range(2))
    for dataset in (one, other):
        dataset.read(0, 0)
    overwrite(0, b"\xff" * 50_000)(one.path(0))
    assert everything(one) == expected
    assert everything(other) == expected
    assert server.count("00000.tar") == {"train/00000.tar": 2}


def test_a_shard_damaged_at_its_source_is_not_fetched_again(server: WebServer, folder: Path) -> None:
    tar = folder / "00000.tar"
    second = SAMPLE * 3 + 1024  # a second member's header, which is not checked when the shard is fetched
    overwrite(second, b"\xff" * 512)(tar)
    about = json.loads((folder / "manifest.json").read_text())
    about["shards"][0]["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(about))
    dataset = Dataset.open(f"{server.url}/train")
    for _ in range(3):
        with pytest.raises(DataError, match=rf"00000\.tar, offset {second}"):
            dataset.read(0, 3)
    assert server.count("00000.tar") == {"train/00000.tar": 1}, "the copy is what the manifest says"


@pytest.mark.parametrize(
    ("suffix", "harm"),
    [(".tar", overwrite(16 * 2560 + 1536, b"\xff" * 900)), (".tar.idx", moved(3, 1024))],
    ids=["pixels", "another sample's label"],
)
def test_a_sample_damaged_in_the_cache_is_read_correctly_again(
    digits: Path, shards_cache: Path, suffix: str, harm: Callable[[Path], None]
) -> None:
    server = WebServer(digits)
    try:
        home = Dataset.open(str(digits / "val"))
        dataset = Dataset.open(f"{server.url}/val")
        harm(dataset.path(0).with_suffix(suffix))
        batches = [list(evaluation(one, rank=0, world=1, batch=359, size=(32, 32))) for one in (home, dataset)]
        assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(*batches, strict=True))
        assert batches[1][0].bad == []
    finally:
        server.shutdown()
        server.server_close()


# ---- prefetching


def _join_workers() -> None:
    for thread in threading.enumerate():
        if thread.name == "shards ahead":
            thread.join()


def test_prefetched_shards_are_in_the_cache_when_they_are_read(server: WebServer, expected: list) -> None:
    dataset = Dataset.open(f"{server.url}/train")
    dataset.prefetch(range(SHARDS))
    _join_workers()
    server.requests.clear()
    assert everything(dataset) == expected
    assert not server.requests
    assert (dataset.traffic.hits, dataset.traffic.misses) == (SHARDS, 0)


def test_no_more_is_prefetched_than_the_cache_holds(server: WebServer) -> None:
    dataset = Dataset.open(f"{server.url}/train", cache=TWO_SHARDS)
    dataset.prefetch([4, 2, 3, 1])
    _join_workers()
    assert server.count(".tar") == {"train/00004.tar": 1, "train/00002.tar": 1}


def test_a_new_request_replaces_downloads_that_have_not_started(server: WebServer) -> None:
    for number in range(4):
        server.faults[f"train/{number:05d}.tar"] = [hang(1000)]
    dataset = Dataset.open(f"{server.url}/train")
    dataset.prefetch([0, 1, 2, 3, 4])
    assert server.hanging.wait(60)
    dataset.prefetch([5])
    server.resume.set()
    _join_workers()
    assert "train/00005.tar" in server.requests
    assert "train/00004.tar" not in server.requests


def test_an_error_in_the_background_is_raised_when_the_shard_is_read(server: WebServer, folder: Path) -> None:
    (folder / "00001.tar").rename(folder / "aside")
    dataset = Dataset.open(f"{server.url}/train")
    dataset.prefetch([0, 1])
    _join_workers()
    assert dataset.read(0, 0)["__key__"] == "0-0"
    with pytest.raises(DataError, match=r"00001.tar is not there"):
        dataset.read(1, 0)
    (folder / "aside").rename(folder / "00001.tar")
    assert dataset.read(1, 0)["__key__"] == "1-0"


def test_a_process_can_end_while_shards_are_prefetched(server: WebServer) -> None:
    server.faults["train/00000.tar"] = [hang(1000)]
    code = f"""
from vimscale.data.dataset import Dataset
Dataset.open("{server.url}/train").prefetch([0])
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, text=True
    )
    assert server.hanging.wait(60)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def test_a_data_set_is_pickled_with_only_its_address_and_settings(server: WebServer, expected: list) -> None:
    dataset = Dataset.open(f"{server.url}/train", cache="1GB", retry=HASTY)
    dataset.prefetch([0])
    dataset.read(1, 0)
    again = pickle.loads(pickle.dumps(dataset))
    assert everything(again) == expected
    assert (again.store.retry, again._cache.limit) == (HASTY, 10**9)
    _join_workers()


def test_a_file_without_a_manifest_is_fetched_every_time(server: WebServer, folder: Path) -> None:
    assert local_copy(f"{server.url}/train/00000.tar").read_bytes() == (folder / "00000.tar").read_bytes()
    overwrite(0, b"new")(folder / "00000.tar")
    assert local_copy(f"{server.url}/train/00000.tar").read_bytes()[:3] == b"new"
    assert local_copy(str(folder / "00000.tar")) == folder / "00000.tar"
    assert local_copy(f"file://{folder}/00000.tar") == folder / "00000.tar"
    with pytest.raises(DataError, match=r"none.tar is not there"):
        local_copy(f"{server.url}/train/none.tar")


def test_fetched_files_are_readable_by_this_user_only(server: WebServer, shards_cache: Path) -> None:
    Dataset.open(f"{server.url}/train").read(0, 0)
    assert shards_cache.stat().st_mode & 0o777 == 0o700
