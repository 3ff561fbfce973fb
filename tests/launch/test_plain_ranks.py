"""Processes that work together: one result, or the first rank's error."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vimscale.errors import DataError, LaunchError, RunFailed
from vimscale.launch.processes import plain_ranks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def _sum(device: torch.device, rank: int, world: int) -> tuple[str, torch.Tensor]:
    values = torch.full((3,), float(rank + 1), device=device)
    dist.all_reduce(values)
    return f"rank {rank} of {world}", values


def _fail(how: str, device: torch.device, rank: int, world: int) -> None:
    if rank == 1:
        if how == "user":
            raise DataError("the data of rank 1 are gone")
        if how == "bug":
            raise KeyError("surprise")
        os._exit(3)
    dist.all_reduce(torch.zeros(1, device=device))


def test_ranks_meet_and_rank_0_answers() -> None:
    said, values = plain_ranks.run(_sum, 2)
    assert said == "rank 0 of 2"
    assert values.tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", DataError, "^the data of rank 1 are gone$"),
        ("bug", RunFailed, "^rank 1 of 2: KeyError: 'surprise'"),
        ("death", RunFailed, "^rank 1 of 2: its process exited with code 3$"),
    ],
)
def test_the_failure_of_a_rank_ends_all(how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        plain_ranks.run(partial(_fail, how), 2)


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"--workers 100000: each rank takes one (CPU|GPU) and this machine has"):
        plain_ranks.run(_sum, 100_000)
