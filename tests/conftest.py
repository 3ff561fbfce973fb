"""What several tests share: a small recipe, and the command line as a user runs it."""

import os
from pathlib import Path

import pytest

from tests.shell import Shell

SMALL = """\
name: small
steps: 50
batch: 32
model: {preset: vim_digits, d_model: 32, depth: 2, drop_path: 0.1}
data: {train: "digits:train", val: "digits:val"}
augment: {crop_min: 0.7, flip: 0.0}
optim: {lr: 1e-3, warmup: 5, ema: 0.9}
checkpoint: {every: 20}
log: {every: 5}
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shell(tmp_path: Path, cache: Path) -> Shell:
    (tmp_path / "small.yaml").write_text(SMALL)
    return Shell(tmp_path, os.environ | {"XDG_CACHE_HOME": str(cache)})


@pytest.fixture(scope="session")
def digits(cache: Path) -> Path:
    """The embedded set as shards, with train/ and val/."""
    from vimscale.data import digits

    folder = cache / "digits"
    digits.write(folder)
    return folder
