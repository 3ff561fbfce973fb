"""The progress line says how far, how fast, how long and where the loss goes, in every width."""

import io
import math
import random
from typing import Any

import pytest
from rich.console import Console

from vimscale.launch.supervise import progress
from vimscale.launch.supervise.progress import Line, Progress, speed
from vimscale.report.pace import Pace, trend

ROW = {"loss": 0.4321, "figures": {"entropy": 1.5}, "images_per_s": 2310.0, "data_wait": 0.03, "grad_norm": 1.4}
ROW |= {"lr": 2e-3, "memory_gb": 16.6, "step": 300}
GPU = {"kind": "gpu", "name": "NVIDIA H100 80GB HBM3", "memory": 85_000_000_000}


def _line(**changes: Any) -> Line:
    return Line(300, 674, ROW, "falling", 0.25, 93.5, None, False)._replace(**changes)


def _plain() -> tuple[Progress, io.StringIO]:
    said = io.StringIO()
    return Progress(Console(file=said, width=300)), said


def _step(step: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "step", **ROW, "step": step, "steps": 674, "figures": {}, **changes}


# ---- speed and trend


def test_the_time_left_contains_pauses_and_the_speed_does_not() -> None:
    pace, now = Pace(), 0.0
    assert (pace.step_s, pace.left_s(1000)) == (None, None)
    for step in range(0, 501, 10):
        pace.add(step, now)
        now += 10 * 0.5 + (20 if step % 100 == 0 else 0)  # a step takes 0.5 s, an evaluation every 100 steps 20 s
    assert pace.step_s == pytest.approx(0.5)
    assert pace.left_s(1000) == pytest.approx(500 * (0.5 + 20 / 100))
    assert pace.left_s(500) == 0


def test_the_speed_follows_the_run_and_begins_again_after_a_rollback() -> None:
    pace = Pace()
    for step in range(100):
        pace.add(step, step * 1.0 if step < 50 else 50 + (step - 50) * 3.0)
    assert pace.step_s == pytest.approx(3.0)
    pace.add(40, 500.0)
    assert pace.step_s is None


def test_a_trend_is_seen_through_noise_and_spikes() -> None:
    noise = random.Random(0)
    falling = [3 - i / 200 + noise.gauss(0, 0.2) for i in range(200)]
    level = [2 + noise.gauss(0, 0.2) for _ in range(200)]
    assert trend(falling) == "falling"
    assert trend(falling[::-1]) == "rising"
    assert trend(level) == "flat"
    spiked = level.copy()
    spiked[150:153] = [1e6, math.nan, math.inf]
    assert trend(spiked) == "flat"
    assert trend([2.0] * 200) == "flat"
    assert trend(falling[:19]) is None
    assert trend([math.nan] * 100) is None


def test_speeds_are_written_by_their_size() -> None:
    assert [speed(step_s) for step_s in (0.081, 0.999, 1.0, 2.414, 123.4)] == [
        "12.3 steps/s", "1.0 steps/s", "1.00 s/step", "2.41 s/step", "123 s/step",
    ]  # fmt: skip


# ---- the line


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 100, 140, 300])
@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("steps", [674, 1_000_000])
def test_a_line_never_exceeds_the_terminal(width: int, waiting: bool, steps: int) -> None:
    for doing in ("", "evaluating"):
        line = _line(steps=steps, waiting=waiting, memory=GPU["memory"], doing=doing)
        assert line.fitted(width).cell_len <= width


def test_a_line_of_80_columns_has_what_matters_and_a_wide_one_everything() -> None:
    narrow, wide = (_line(memory=GPU["memory"]).fitted(width).plain for width in (80, 180))
    for part in ("44%", "300/674", "loss 0.4321 ↘", "4.0 steps/s", "2,310 images/s", "ETA 1:34"):
        assert part in narrow
        assert part in wide
    for part in ("GPU 16.6/85 GB", "━", "─", "entropy 1.5", "data wait 3%", "|g| 1.40", "lr 2.00e-03"):
        assert part in wide
    busy = _line(memory=GPU["memory"], event=ROW | {"gpu_busy": 0.97}).fitted(180).plain
    assert "GPU 16.6/85 GB 97% busy" in busy
    assert "GPU" not in _line().fitted(180).plain


def test_a_loader_that_is_the_limit_comes_before_the_speed() -> None:
    assert "data wait 31%" in _line(event=ROW | {"data_wait": 0.31}, waiting=True).fitted(60).plain
    assert "data wait" not in _line().fitted(60).plain


def test_a_terminal_without_unicode_gets_words() -> None:
    text = _line().fitted(120, ascii_only=True).plain
    assert text.isascii()
    assert "loss 0.4321 falling" in text


# ---- events


def test_a_warning_does_not_color_the_line_below_it() -> None:
    said = io.StringIO()
    variables = {"TERM": "xterm-256color"}
    shown = Progress(Console(file=said, width=100, force_terminal=True, color_system="standard", _environ=variables))
    shown.show(_step(300))
    said.truncate(said.seek(0))
    shown.note("warning", "the disk is full")
    warned = said.getvalue()
    shown.close()
    yellow = "\x1b[33m"
    assert f"{yellow}the disk is full" in warned
    assert "loss 0.4321" in warned
    assert warned.count(yellow) == 1


def test_a_file_gets_plain_lines() -> None:
    shown, said = _plain()
    for step in (1, 10):
        shown.show(_step(step))
    shown.close()
    first, second = said.getvalue().splitlines()
    assert first == "step 1/674 (0%)  loss 0.4321  2,310 images/s  data wait 3%  |g| 1.40  lr 2.00e-03"
    assert "ETA" in second


@pytest.mark.parametrize(("variables", "live"), [({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, True)])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(variables: dict[str, str], live: bool) -> None:
    said = io.StringIO()
    shown = Progress(Console(file=said, width=100, force_terminal=True, _environ=variables))
    for step in (1, 10):
        shown.show(_step(step))
    shown.heard({"step": 17, "doing": "evaluate"})
    shown.close()
    text = said.getvalue()
    assert ("\x1b[?25l" in text) == live
    assert "\x1b[3" not in text, "no colors"
    assert ("17/674" in text) == live, "heartbeats move the live line"
    last = text.replace("\x1b[?25h", "").rstrip().splitlines()[-1]
    assert "loss 0.4321" in last, "the last line stays"
    assert "evaluating" not in last.rpartition("\r")[2]


@pytest.mark.parametrize(
    ("device", "workers", "threads", "advice"),
    [
        (GPU, 2, 8, "raise data.workers (2 now)"),
        (GPU, 7, 8, "vimscale data prepare --resize"),
        ({"kind": "cpu"}, 0, 4, "raise data.workers (0 now)"),
        ({"kind": "cpu"}, 0, 1, None),
    ],
)
def test_a_slow_loader_is_named_once_with_what_helps(
    device: dict[str, Any], workers: int, threads: int, advice: str | None
) -> None:
    shown, said = _plain()
    shown.show({"kind": "started", "device": device, "workers": workers, "threads": threads})
    for step, wait in enumerate([0.9, 0.0, 0.02, 0.34, 0.35, 0.36, 0.37], 1):
        shown.show(_step(step, data_wait=wait))
    found = [line for line in said.getvalue().splitlines() if line.startswith("the loader is the limit")]
    assert len(found) == (advice is not None)
    if advice is not None:
        assert advice in found[0]
        assert "34% of the time" in found[0]


def test_evaluations_are_compared_with_the_best_before_them() -> None:
    shown, said = _plain()
    best = {"kind": "eval", "step": 100, "images": 10, "top1": 0.8, "loss": 0.5}
    shown.show({"kind": "started", "headline": "top1", "best": best})
    for step, top1 in ((200, 0.7), (300, 0.9)):
        shown.show({"kind": "eval", "step": step, "images": 10, "top1": top1, "loss": 0.4})
    worse, better = said.getvalue().splitlines()
    assert worse.endswith("(10 images), best so far: top-1 80.00% at step 100")
    assert better.endswith("(10 images), the best so far")
    assert progress.figures(best) == "top-1 80.00%  loss 0.5000  (10 images)"


def test_the_best_loss_is_the_smallest() -> None:
    shown, said = _plain()
    shown.show({"kind": "started", "headline": "loss", "best": None})
    for step, loss in ((1, 0.5), (2, 0.7), (3, 0.3)):
        shown.show({"kind": "eval", "step": step, "loss": loss})
    first, worse, better = said.getvalue().splitlines()
    assert "best" not in first
    assert worse.endswith("best so far: loss 0.5000 at step 1")
    assert better.endswith("the best so far")
