"""Shards from web servers, buckets and other stores: the same bytes every time, or one clear error."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest

from tests.support import later
from tests.support.noise import BYTES, HASTY, ROOT, SAMPLE, SAMPLES, SHARDS, TWO_SHARDS, everything, moved
from tests.support.web_server import WebServer, changed, cut, hang, page, redirected, status
from vimscale.data.dataset import Dataset
from vimscale.errors import DataError
from vimscale.storage.store import Bucket, Retry, open_store

obstore = pytest.importorskip("obstore", reason="needs the extra dev")
moto_server = later.module("moto.server")

# ---- a web server


def test_a_warm_cache_gives_the_same_bytes_without_a_request(server: WebServer, expected: list) -> None:
    cold = Dataset.open(f"{server.url}/train")
    assert everything(cold) == expected
    assert server.count(".tar") == {f"train/{n:05d}.tar": 1 for n in range(SHARDS)}
    assert (cold.traffic.hits, cold.traffic.misses) == (0, SHARDS)
    assert cold.traffic.fetched == SHARDS * (BYTES + 8 * (SAMPLES + 1))
    assert cold.traffic.bytes == SHARDS * SAMPLES * SAMPLE

    server.requests.clear()
    warm = Dataset.open(f"{server.url}/train/")
    assert everything(warm) == expected
    assert server.requests == ["train/manifest.json"]
    assert (warm.traffic.hits, warm.traffic.misses, warm.traffic.fetched) == (SHARDS, 0, 0)


TRANSIENT = {
    "busy three times": [status(503)] * 3,
    "too many requests": [status(429)],
    "cut bodies": [cut(50_000), cut(10_000), cut(0)],
    "bytes that are not the manifest's": [changed],
    "a page in place of the shard": [page],
}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("case", TRANSIENT)
def test_transient_failures_are_retried(server: WebServer, expected: list, case: str, ranges: bool) -> None:
    server.ranges = ranges
    server.faults["train/00001.tar"] = list(TRANSIENT[case])
    server.faults["train/00003.tar.idx"] = [status(500)]
    server.faults["train/manifest.json"] = [status(502)]
    assert everything(Dataset.open(f"{server.url}/train", retry=HASTY)) == expected
    assert server.count("1.tar")["train/00001.tar"] == 1 + len(TRANSIENT[case])


def test_a_cut_body_continues_where_it_was_cut(server: WebServer) -> None:
    server.faults["train/00000.tar"] = [cut(60_000), cut(20_000)]
    dataset = Dataset.open(f"{server.url}/train", retry=HASTY)
    dataset.read(0, 0)
    assert dataset.traffic.fetched == BYTES + 8 * (SAMPLES + 1)


def test_a_connection_that_stalls_counts_as_broken(server: WebServer) -> None:
    server.faults["train/00000.tar"] = [hang(1000)]
    impatient = Retry(tries=2, first=0.01, stall=0.3)
    assert Dataset.open(f"{server.url}/train", retry=impatient).read(0, 0)["__key__"] == "0-0"
    assert server.count("0.tar") == {"train/00000.tar": 2}


FINAL = {
    "missing": ([status(404)], 1, r"/train/00001.tar is not there \(HTTP 404 Not Found\)"),
    "forbidden": ([status(403)], 1, r"/train/00001.tar: HTTP 403 Forbidden; check the address and who may read it"),
    "down for long": ([status(503)] * 9, 4, r"/train/00001.tar: HTTP 503 Service Unavailable; tried 4 times"),
    "always cut": ([cut(0)] * 9, 4, r"00001.tar: it ended after 0 of 92,160 bytes; tried 4 times"),
    "another shard": ([changed] * 9, 3, r"00001.tar: downloaded 3 times, it has 92,160 bytes of sha256 [0-9a-f]{64}"),
    "a page": ([page] * 9, 3, r"00001.tar: downloaded 3 times, it has 26 bytes of sha256"),
}


@pytest.mark.parametrize("case", FINAL)
def test_a_permanent_failure_is_one_clear_error(server: WebServer, shards_cache: Path, case: str) -> None:
    faults, requests, said = FINAL[case]
    server.faults["train/00001.tar"] = list(faults)
    dataset = Dataset.open(f"{server.url}/train", retry=HASTY)
    with pytest.raises(DataError, match=said) as caught:
        dataset.read(1, 0)
    assert server.url in str(caught.value)
    assert server.count("1.tar") == {"train/00001.tar": requests}
    assert not list(shards_cache.glob("*.part")) + list(shards_cache.glob("*.tar"))
    if "sha256" in said:
        assert dataset.manifest.shards[1].sha256 in str(caught.value)


def test_an_index_that_is_missing_or_of_another_shard_is_named(server: WebServer, folder: Path) -> None:
    (folder / "00000.tar.idx").unlink()
    moved(2, 512)(folder / "00001.tar.idx")
    moved(2, 7)(folder / "00002.tar.idx")
    dataset = Dataset.open(f"{server.url}/train")
    with pytest.raises(DataError, match=r"00000.tar has no index \(.idx\) next to it; .* `vimscale data index`"):
        dataset.read(0, 0)
    with pytest.raises(DataError, match=rf"00001.tar, offset {2 * SAMPLE + 512}: the index does not fit the tar"):
        dataset.read(1, 0)
    with pytest.raises(DataError, match=r"00002.tar.idx does not index 8 samples"):
        dataset.read(2, 0)


def test_a_missing_manifest_is_reported_with_the_fix(server: WebServer) -> None:
    with pytest.raises(DataError, match=r"has no manifest.json; `vimscale data index` makes one"):
        Dataset.open(f"{server.url}/other")
    server.faults["train/manifest.json"] = [page]
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        Dataset.open(f"{server.url}/train")


def test_passwords_and_signatures_are_sent_but_not_shown(server: WebServer, folder: Path) -> None:
    (folder / "00001.tar").unlink()
    address = server.url.replace("http://", "http://me:secret@")
    dataset = Dataset.open(f"{address}/train?signature=hidden", retry=HASTY)
    server.faults["train/00000.tar"] = [redirected("/train/aside")]
    (folder / "00000.tar").rename(folder / "aside")
    (folder / "00000.tar").touch()
    assert dataset.read(0, 0)["__key__"] == "0-0"
    assert server.passwords["train/00000.tar"] == "Basic bWU6c2VjcmV0"
    assert server.passwords["train/aside"] is None
    with pytest.raises(DataError, match=r"00001.tar is not there") as caught:
        dataset.read(1, 0)
    assert not any(word in str(caught.value) for word in ("secret", "hidden"))
    for path in ("other", "train/[x"):
        with pytest.raises(DataError) as caught:
            Dataset.open(f"{address}/{path}?signature=hidden", retry=HASTY)
        assert not any(word in str(caught.value) for word in ("secret", "hidden"))


def test_a_remote_manifest_may_name_shards_elsewhere(tmp_path: Path, server: WebServer, expected: list) -> None:
    manifest = json.loads((tmp_path / "site" / "train" / "manifest.json").read_text())
    for base in ("../train", f"{server.url}/train", str(tmp_path / "site" / "train")):
        (tmp_path / "site" / "only").mkdir(exist_ok=True)
        (tmp_path / "site" / "only" / "manifest.json").write_text(json.dumps(manifest | {"base": base}))
        assert everything(Dataset.open(f"{server.url}/only")) == expected


# ---- the server dies and comes back


class _Restart(logging.Handler):
    """Restarts a server when a connection to it has failed: no moment earlier or later."""

    def __init__(self, start: Callable[[], None]):
        super().__init__()
        self.start: Callable[[], None] | None = start

    def emit(self, record: logging.LogRecord) -> None:
        if self.start is not None:
            start, self.start = self.start, None
            start()


class _ServerProcess:
    def __init__(self, root: Path):
        self.root, self.port = root, 0

    def start(self, *hang: str) -> None:
        command = [sys.executable, "-m", "tests.support.web_server", str(self.root), str(self.port), *hang]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("when", ["between two shards", "inside a shard"])
def test_a_server_killed_and_restarted_in_the_middle_of_an_epoch_changes_nothing(
    folder: Path, expected: list, when: str
) -> None:
    server = _ServerProcess(folder.parent)
    server.start(*(["train/00003.tar", "70000"] if when == "inside a shard" else []))
    restart = _Restart(server.start)
    store_log = logging.getLogger("vimscale.storage.store")
    store_log.addHandler(restart)
    try:
        dataset = Dataset.open(f"http://127.0.0.1:{server.port}/train", retry=Retry(tries=4, first=0.01))
        for number in range(3):
            dataset.read(number, 0)
        if when == "inside a shard":
            assassin = threading.Thread(target=lambda: (server.line(), server.kill()))
            assassin.start()
            dataset.read(3, 0)
            assassin.join()
        else:
            server.kill()
        assert everything(dataset) == expected
        assert restart.start is None
    finally:
        store_log.removeHandler(restart)
        server.kill()


# ---- buckets


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def bucket(keys: pytest.MonkeyPatch, folder: Path) -> Iterator[Any]:
    """s3://pictures/train on its own server."""
    moto = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    keys.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    urlopen(Request(f"http://{host}:{port}/pictures", method="PUT")).close()
    store = open_store("s3://pictures/train")
    assert isinstance(store, Bucket)
    for path in folder.iterdir():
        obstore.put(store._bucket, path.name, path)
    yield moto
    moto.stop()


def test_a_bucket_is_read_cold_warm_and_through_a_cache_of_two_shards(
    bucket: Any, shards_cache: Path, expected: list
) -> None:
    for cache, misses in (("100GB", SHARDS), ("100GB", 0)):
        dataset = Dataset.open("s3://pictures/train", cache=cache)
        assert everything(dataset) == expected
        assert dataset.traffic.misses == misses
    shutil.rmtree(shards_cache)
    small = Dataset.open("s3://pictures/train/", cache=TWO_SHARDS)
    assert everything(small) == expected
    assert len(list(shards_cache.glob("*.tar"))) == 2


def test_a_bucket_is_checked_by_listing_it(bucket: Any) -> None:
    store = open_store("s3://pictures/train")
    assert isinstance(store, Bucket)
    obstore.put(store._bucket, "00001.tar", b"<html>")
    obstore.delete(store._bucket, "00002.tar.idx")
    with pytest.raises(DataError, match=r"(?s)00001.tar has 6 bytes, not 92,160.*00002.tar.idx is missing"):
        Dataset.open("s3://pictures/train")


def test_a_bucket_whose_server_restarts_in_the_middle_changes_nothing(bucket: Any, expected: list) -> None:
    dataset = Dataset.open("s3://pictures/train", retry=Retry(tries=5, first=0.01))
    dataset.read(0, 0)
    bucket.stop()
    bucket._server.server_close()
    bucket._port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    restart = _Restart(bucket.start)
    logging.getLogger("vimscale.storage.store").addHandler(restart)
    try:
        assert everything(dataset) == expected
        assert restart.start is None
    finally:
        logging.getLogger("vimscale.storage.store").removeHandler(restart)


def test_a_missing_bucket_or_file_is_reported_at_once(bucket: Any) -> None:
    with pytest.raises(DataError, match=r"s3://pictures/other has no manifest.json"):
        Dataset.open("s3://pictures/other")
    with pytest.raises(DataError, match=r"s3://no-such/train has no manifest.json"):
        Dataset.open("s3://no-such/train")


@pytest.fixture
def endpoint(tmp_path: Path, keys: pytest.MonkeyPatch, folder: Path, server: WebServer) -> WebServer:
    """A bucket's server that fails on demand: for reading, S3 is a web server with ranges."""
    keys.setenv("AWS_ENDPOINT_URL", server.url)
    (tmp_path / "site" / "pictures").mkdir()
    folder.rename(tmp_path / "site" / "pictures" / "train")
    return server


@pytest.mark.parametrize("case", TRANSIENT)
def test_transient_failures_of_a_bucket_are_retried(endpoint: WebServer, expected: list, case: str) -> None:
    endpoint.faults["pictures/train/00001.tar"] = list(TRANSIENT[case])
    assert everything(Dataset.open("s3://pictures/train", retry=HASTY)) == expected
    assert endpoint.count("1.tar")["pictures/train/00001.tar"] == 1 + len(TRANSIENT[case])


FINAL_IN_A_BUCKET = {
    "missing": ([status(404)], 1, "s3://pictures/train/00001.tar is not there; check bucket, folder and AWS_ENDPOINT"),
    "forbidden": ([status(403)], 1, "00001.tar: .*403 Forbidden; check the region and the keys in the environment"),
    "faulty": ([status(400)], 1, "00001.tar: .*400 Bad Request; check the region"),
    "down for long": ([status(503)] * 9, 4, "00001.tar: .*503 Service Unavailable; tried 4 times"),
    "always cut": ([cut(0)] * 9, 4, "00001.tar: .*body error; tried 4 times"),
    "another shard": ([changed] * 9, 3, "00001.tar: downloaded 3 times, it has 92,160 bytes of sha256"),
}


@pytest.mark.parametrize("case", FINAL_IN_A_BUCKET)
def test_a_permanent_failure_of_a_bucket_is_one_clear_error(endpoint: WebServer, case: str) -> None:
    faults, requests, said = FINAL_IN_A_BUCKET[case]
    endpoint.faults["pictures/train/00001.tar"] = list(faults)
    with pytest.raises(DataError, match=said):
        Dataset.open("s3://pictures/train", retry=HASTY).read(1, 0)
    assert endpoint.count("1.tar") == {"pictures/train/00001.tar": requests}


# ---- other schemes


def test_fsspec_reads_everything_it_has_a_driver_for(folder: Path, expected: list) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/pictures/train", recursive=True)
    for cache in ("100GB", TWO_SHARDS):
        assert everything(Dataset.open("memory://pictures/train", cache=cache)) == expected
    files.pipe("/pictures/train/00001.tar", b"<html>")
    with pytest.raises(DataError, match=r"00001.tar has 6 bytes, not 92,160"):
        Dataset.open("memory://pictures/train")
    with pytest.raises(DataError, match=r"has no manifest.json"):
        Dataset.open("memory://pictures/other")


def test_a_file_address_is_a_folder(folder: Path, shards_cache: Path, expected: list) -> None:
    assert everything(Dataset.open(f"file://{folder}")) == expected
    assert not shards_cache.exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pipe:cat x.tar", "pipe:cat x.tar: no command is run to read data"),
        ("nonsense://x", r"nonsense:// is not a known scheme; folders and http\(s\):// can always be read"),
        ("sftp://host/x", "sftp:// needs another package: .*paramiko"),
        ("s3://", "write s3://BUCKET/FOLDER"),
        ("http://[x/train", "is not an address"),
        ("/nowhere/at/all", "/nowhere/at/all is not there"),
    ],
)
def test_an_unreadable_source_is_reported_with_the_fix(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Dataset.open(source)


@pytest.mark.parametrize(
    ("library", "source", "extra"), [("obstore", "s3://b/x", "s3"), ("fsspec", "hf://datasets/x", "fsspec")]
)
def test_a_missing_library_is_reported_with_its_extra(library: str, source: str, extra: str) -> None:
    code = f"""
import sys
sys.modules["{library}"] = None
from vimscale.data.dataset import Dataset
from vimscale.errors import DataError
try:
    Dataset.open("{source}")
except DataError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"needs {library}, which is not installed: pip install 'vimscale[{extra}]'" in done.stdout
