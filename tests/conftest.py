"""Fixtures that several test packages share."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# As in ranks (processes/rank.py), and before torch is loaded: the idle threads of two test processes would spin on the
# cores that the others need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import torch.distributed as dist

from tests.support.shell import Shell, new_shell

if TYPE_CHECKING:
    from tests.support.web_server import WebServer

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported


LAUNCHES = {"shell", "watched", "calm", "trained", "runs", "head"}
"""Fixtures of tests that launch runs."""


def pytest_collection() -> None:
    """Exempt what imports make from garbage collection: looking through it was a third of collecting the tests."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run launches first, so that no worker is left with a long one while the others are done."""
    items.sort(key=lambda item: not LAUNCHES.intersection(getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shell(tmp_path: Path, cache: Path) -> Iterator[Shell]:
    """Provide a shell, and kill its processes after the test: one that ran out of time would leave its run behind."""
    provided = new_shell(tmp_path, cache)
    yield provided
    provided.end()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Set up a process group of one rank."""
    store = dist.FileStore(str(tmp_path / "meeting"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def digits(cache: Path) -> Path:
    """Return the embedded data set as shards, with train/ and val/."""
    from vimscale.data import digits

    folder = cache / "digits"
    digits.write(folder)
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of noise, which tests must not change."""
    from tests.support.noise import write_set

    return write_set(tmp_path_factory.mktemp("written") / "train")


@pytest.fixture
def folder(tmp_path: Path, written: Path, shards_cache: Path) -> Path:
    """Return a copy of the set that the test may damage, with the test's own cache."""
    return Path(shutil.copytree(written, tmp_path / "site" / "train"))


@pytest.fixture
def server(tmp_path: Path, folder: Path) -> Iterator["WebServer"]:
    """Serve `folder` as /train."""
    from tests.support.web_server import WebServer

    server = WebServer(tmp_path / "site")
    yield server
    server.resume.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def shards_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIMSCALE_CACHE", str(tmp_path / "shards"))
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def expected(written: Path) -> list[tuple[str, bytes, bytes]]:
    """Return all samples of `written`, in the order of `everything`."""
    from tests.support.noise import everything
    from vimscale.data.dataset import Dataset

    return everything(Dataset.open(str(written)))
