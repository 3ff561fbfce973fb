"""Processes that start before it is known what they have to do."""

from pathlib import Path

import pytest

from vimscale.launch.hardware import nvidia_devices
from vimscale.launch.processes import on_local
from vimscale.launch.processes.rank import Ending
from vimscale.recipe import recipe


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 3), ("", 0), ("1", 1), ("0,2", 2), ("GPU-5a,GPU-6b,GPU-7c,GPU-8d", 3)]
)
def test_devices_are_counted_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia_devices(tmp_path) == expected


def test_unused_spares_end_and_dead_ones_are_not_used() -> None:
    spares = on_local.Spares(2)
    idle = [process for process, _ in spares._idle]
    idle[1].kill()
    idle[1].wait()
    process, pipe = spares.take()
    assert process is idle[0]
    pipe.close()
    process.wait(60)  # it ends because nobody can give it work any more
    on_local.Spares(0).close()
    more = on_local.Spares(1)
    [(last, _)] = more._idle
    more.close()
    assert last.poll() is not None


@pytest.mark.slow
def test_a_group_trains_on_spares_and_closes_what_it_does_not_need(tmp_path: Path) -> None:
    chosen = recipe.load("vim_digits_cpu", ["steps=2", "optim.warmup=0", "evaluate.every=0"])
    spares = on_local.Spares(2)
    idle = {process.pid: process for process, _ in spares._idle}
    group = on_local.LocalGroup(chosen, tmp_path, 1, 300.0, spares=spares)
    try:
        group.start()
        [used] = group._processes
        assert used.pid in idle
        [other] = [process for pid, process in idle.items() if pid != used.pid]
        assert other.poll() is not None
        reports: list = []
        while not any(isinstance(report, Ending) for report in reports):
            reports += group.poll(10)
    finally:
        group.kill()
    assert reports[-1].status == "done"
