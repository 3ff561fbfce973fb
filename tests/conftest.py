"""What several tests share."""

import os
from pathlib import Path

import pytest
import torch

from tests.shell import Shell, new_shell

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shell(tmp_path: Path, cache: Path) -> Shell:
    return new_shell(tmp_path, cache)


@pytest.fixture(scope="session")
def digits(cache: Path) -> Path:
    """The embedded set as shards, with train/ and val/."""
    from vimscale.data import digits

    folder = cache / "digits"
    digits.write(folder)
    return folder
