"""Pages about runs: what they hold, what they refuse, and that nothing from a run gets out of its place."""

import http.client
import json
import platform
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.commands import app
from tests.support import later
from tests.support.recorded import append, write_run
from tests.support.shell import Shell
from vimscale.errors import CheckpointError, LaunchError, RecipeError, UserError
from vimscale.report import decimate, record, series

page = later.module("vimscale.report.page", "bokeh")
serve = later.module("vimscale.report.serve", "bokeh")

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>$$x$$"


def _page(*folders: Path) -> str:
    records = [record.read(str(folder)) for folder in folders]
    return page.html(page.collect(records, ["not asked for"] * len(records)))


def _text(*folders: Path) -> str:
    """Return the page without its charts."""
    records = [record.read(str(folder)) for folder in folders]
    return "".join(page.collect(records, ["not asked for"] * len(records)).parts.values())


def _fails(*arguments: str) -> UserError:
    result = CliRunner().invoke(app.app, ["report", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return result.exception


# ---- decimation


def test_the_spikes_of_a_long_curve_stay() -> None:
    loss, rate = np.ones(100_000) + np.linspace(0, 0.1, 100_000), np.ones(100_000)
    loss[12_345], loss[77_777], rate[50_001] = 9.0, -3.0, 0.25
    loss[31_000], loss[32_000] = np.inf, np.nan
    kept = decimate.kept([loss, rate], 4000)
    assert {0, 12_345, 31_000, 50_001, 77_777, 99_999} <= set(kept.tolist())
    assert len(kept) < 4200
    assert (np.diff(kept) > 0).all()
    assert decimate.kept([loss[:50]], 4000).tolist() == list(range(50))


def test_a_heat_map_keeps_the_value_farthest_from_its_layers_median() -> None:
    values = np.ones((3, 1000))
    values[1, 501], values[2, 999], values[0, 7] = 40.0, -5.0, np.nan
    first, binned = decimate.outliers(values, 100)
    assert len(first) == binned.shape[1] == 100
    assert binned[1, 50] == 40.0
    assert binned[2, 99] == -5.0
    assert np.isfinite(binned).all()


@pytest.mark.slow
def test_a_run_of_100_000_steps_is_a_page_of_bounded_size(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", 1000)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(100):
            for line in lines:
                row = json.loads(line)
                row["step"] += 1000 * i
                row["loss"] = 50.0 if row["step"] == 54_321 else row.get("loss", 0.0)
                file.write(json.dumps(row) + "\n")
    found = series.pictures([record.read(str(folder))])
    sources = found.sources["steps0"]
    assert np.asarray(sources["loss"]).max() == 50.0
    assert 54_321 in np.asarray(sources["step"])
    assert sum(len(c) * 4 for columns in found.sources.values() for c in columns.values()) < 1_000_000


# ---- content


def test_a_page_holds_what_became_of_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 100)
    append(folder, {"kind": "eval", "step": 50, "images": 10, "top1": 0.75, "loss": 0.9})
    append(folder, {"kind": "guard", "action": "skip", "step": 60, "row": 1, "loss": 99.0, "grad_norm": 3.0})
    append(folder, {"kind": "warning", "step": 70, "message": "the features collapse"})
    failure = {"time": "2026-11-27T07:39:19+0000", "step": 55, "saved": 40, "world": 2, "cause": "died", "rank": 1}
    failure |= {"host": "there", "exception": "", "message": "was killed by SIGKILL", "others": []}
    (folder / "failures.json").write_text(json.dumps([failure]))
    found = record.read(str(folder))
    assert (found.last, found.steps) == (100, 100)
    assert {event.kind for event in found.events} == {"failure", "skip", "warning"}
    text = _page(folder)
    for expected in (
        "75.00%",
        "1 failure, 1 skipped step, 1 warning",
        "was killed by SIGKILL",
        "the features collapse",
    ):
        assert expected in text
    assert "◀─▶" in text
    assert "vim_digits" in text


def test_why_a_run_failed_is_at_the_top_and_in_the_timeline(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 100)
    failed = {"time": "2026-11-27T07:39:19+0000", "message": f"rank 0: {HOSTILE}", "exit_code": 1}
    (folder / "environment.json").write_text(json.dumps({"host": platform.node(), "failed": failed}))
    found = record.read(str(folder))
    assert (found.status, found.failed) == ("failed", f"rank 0: {HOSTILE}")
    assert [event.kind for event in found.events] == ["end"]
    text = _page(folder)
    assert text.count("failed: rank 0: &lt;/script&gt;") == 2
    assert "<img src=x" not in text
    (folder / "result.json").write_text(json.dumps({"status": "done", "step": 100, "steps": 100}))
    assert record.read(str(folder)).failed == ""


def test_what_a_run_lacks_is_said_with_the_key_that_brings_it(tmp_path: Path) -> None:
    text = _page(write_run(tmp_path / "new", 0))
    for expected in ("No step has finished yet", "evaluate.every", "log.every", "checkpoint.every", "guard.spike"):
        assert expected in text


def test_several_runs_are_overlaid_with_what_differs(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", 100, "optim.lr=5e-4")
    text = _text(one, other)
    assert re.search(r"optim\.lr</td><td>0\.002</td><td>0\.0005</td>", text)
    assert "optim.warmup</td>" not in text
    found = series.pictures([record.read(str(one)), record.read(str(other))])
    loss = next(chart for chart in found.charts if chart.key == "loss")
    assert {line.run for line in loss.lines} == {0, 1}


def test_a_last_line_that_is_being_written_does_not_count_and_damaged_lines_do(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cut", 20)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3], lines[5] = "{", '{"kind": "train", "step": 6, "loss": true, "lr": 1e999999}'
    lines[7] = '{"kind": "train", "step": 8, "loss": 1' + "0" * 400 + ', "lr": 0.1}'
    path.write_text("\n".join(lines)[:-9])
    found = record.read(str(folder))
    assert found.damaged == 3
    assert len(found.rows["train"]) == 17
    assert "3 lines of metrics.jsonl cannot be read" in _text(folder)


def test_a_run_is_running_while_a_launch_holds_its_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "held", 20)
    (folder / "environment.json").write_text(json.dumps({"host": platform.node()}))
    assert record.read(str(folder)).status == "died"
    launch = record.RunFolder(folder)
    launch.hold("end that one")
    assert record.read(str(folder)).status == "running"
    launch.release()
    (folder / "checkpoints" / "step_00000020").mkdir()
    (folder / "checkpoints" / "step_00000020" / "manifest.json").write_text("{}")
    assert record.read(str(folder)).status == "stopped", "it saved its last step"
    (folder / "environment.json").write_text(json.dumps({"host": "another"}))
    assert record.read(str(folder)).status == "running"


# ---- strangers


def test_nothing_from_a_run_leaves_its_place_in_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>run", 20)
    append(folder, {"kind": "warning", "step": 10, "message": HOSTILE})
    append(folder, {"kind": "train", "step": 30, "loss": 1.0, "lr": 1.0, "images_per_s": 1.0, HOSTILE: 1.0})
    append(folder, {"kind": "eval", "step": 20, "images": 1, "loss": 1.0, HOSTILE: 0.5})
    append(folder, {"kind": "layers", "step": 20, "layer": [0, "x"], HOSTILE: [1.0, {}]})
    append(folder, {"kind": "layers", "step": 20, "layer": [0, 1], HOSTILE: [1.0, 2.0]})
    (folder / "environment.json").write_text(
        json.dumps({"host": HOSTILE, "packages": {HOSTILE: HOSTILE}, "command": 3})
    )
    (folder / "failures.json").write_text(json.dumps([{"message": HOSTILE, "time": HOSTILE, "step": HOSTILE}, 7]))
    with (folder / "recipe.yaml").open("a") as file:
        file.write(f"# {HOSTILE}\n")
    (folder / "guard" / "step_00000010").mkdir(parents=True)
    (folder / "guard" / "step_00000010" / "report.json").write_text(json.dumps({"samples": HOSTILE, "step": HOSTILE}))
    text = _page(folder)
    bare = re.sub(r'<script type="text/plain" id="library">.*?</script>', "", text)
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert "<b>run" not in text
    assert bare.count("<script") == bare.count("</script>") == 3
    rule = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert rule is not None
    assert "default-src &#x27;none&#x27;" in rule[1]
    assert "connect-src" not in rule[1]
    assert "unsafe-eval" not in rule[1]


def test_python_files_that_a_recipe_names_are_not_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "own", 20)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("kind: classification", "kind: mine.py:Mine"))
    assert "which a report does not run" in _text(folder)
    assert not (tmp_path / "ran").exists()


# ---- the command


def test_wrong_input_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(write_run(tmp_path / "runs" / "mine", 20))
    assert "run nothing: no recipe.yaml in it; runs here: mine" in str(_fails("nothing"))
    (tmp_path / "photos").mkdir()
    assert isinstance(_fails("photos"), CheckpointError)
    assert "ends in .html" in str(_fails(run, "--to", "page.txt"))
    assert "go with --serve" in str(_fails(run, "--port", "8000"))
    assert "leave out --to" in str(_fails(run, "--serve", "--to", "a.html"))
    (tmp_path / "runs" / "mine" / "recipe.yaml").write_text("name: [")
    assert isinstance(_fails(run), RecipeError)


@pytest.mark.slow
def test_the_command_writes_a_page_with_the_plan(shell: Shell) -> None:
    write_run(shell.folder / "runs" / "mine", 60)
    (shell.folder / "runs" / "mine" / "logs").mkdir()
    log = shell.folder / "runs" / "mine" / "logs" / "rank_00000.txt"
    log.write_text("2026-11-27T07:37:27+0000 rank 0 of 2: process 13541 on there\n")
    assert "mine_report.html" in shell.run("report", "mine")
    text = (shell.folder / "mine_report.html").read_text()
    assert "2 ranks, 32 images x 1 micro-steps; planned for CPUs" in text
    assert len(text.encode()) < 1_000_000
    assert "its folder does not exist" in shell.run("report", "mine", "--to", "missing/a.html", expect=2)
    (shell.folder / "folder.html").mkdir()
    assert "it is a folder" in shell.run("report", "mine", "--to", "folder.html", expect=2)


@pytest.mark.slow
def test_ctrl_c_ends_serving_with_code_0(shell: Shell) -> None:
    write_run(shell.folder / "runs" / "mine", 60)
    process = shell.popen("report", "mine", "--serve")
    assert process.stdout is not None
    assert process.stdout.readline() == "serving mine at\n"
    port = urlsplit(process.stdout.readline()).port
    assert "address already in use" in shell.run("report", "mine", "--serve", "--port", str(port), expect=2).lower()
    process.send_signal(signal.SIGINT)
    assert "stopped" in shell.finish(process)


# ---- serving


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    folder = write_run(tmp_path / "mine", 50)

    def collect() -> Any:
        return page.collect([record.read(str(folder))], ["not asked for"])

    with serve.Server(serve.Reports([folder], collect), 0, "secret") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server, folder
        server.shutdown()
        thread.join()


def _get(server: Any, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_only_the_page_and_its_data_are_served_to_those_who_know_the_token(served: tuple[Any, Path]) -> None:
    server, _ = served
    assert urlsplit(server.address).hostname == "127.0.0.1"
    for path in ("/", "/secre/", "/secret", "/secret/../", "/secret/metrics.jsonl", "/secret//etc/passwd", "/data"):
        assert _get(server, path)[0] == 404, path
    assert _get(server, "/secret/", host=f"evil.example:{server.server_port}")[0] == 403
    assert _get(server, "/secret/data", host="localhost:8000")[0] == 200
    code, text = _get(server, "/secret/")
    assert code == 200
    assert "connect-src &#x27;self&#x27;" in text


def test_data_are_sent_when_the_run_has_grown(served: tuple[Any, Path]) -> None:
    server, folder = served
    code, text = _get(server, "/secret/data?have=nothing")
    first = json.loads(text)
    assert code == 200
    assert _get(server, f"/secret/data?have={first['stamp']}")[0] == 204
    append(folder, {"kind": "train", "step": 51, "loss": 0.1, "lr": 1e-3})
    code, text = _get(server, f"/secret/data?have={first['stamp']}")
    news = json.loads(text)
    assert code == 200
    assert news["form"] == first["form"]
    assert "51 of 60 steps" in news["parts"]["summary"]
    append(folder, {"kind": "eval", "step": 51, "images": 1, "loss": 0.1})
    assert json.loads(_get(server, "/secret/data")[1])["form"] != first["form"]


def test_a_busy_port_is_one_message(served: tuple[Any, Path]) -> None:
    server, _ = served
    with pytest.raises(LaunchError, match="choose another one"):
        serve.Server(server.reports, server.server_port, None)


def test_the_page_names_what_the_ranks_computed_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 20)
    gpu = {"kind": "gpu", "name": "NVIDIA H100 80GB HBM3", "memory": 85_000_000_000, "cpu": "EPYC", "driver": "580.1"}
    gpu |= {"cuda": "13.0", "ranks": 8, "hosts": ["one", "two"]}
    cpu = {"kind": "cpu", "name": "Xeon", "memory": 25_000_000_000, "ranks": 2, "hosts": HOSTILE}
    (folder / "environment.json").write_text(json.dumps({"devices": [gpu, cpu, 7]}))
    text = _text(folder)
    assert "8 x NVIDIA H100 80GB HBM3, 85 GB, driver 580.1, CUDA 13.0, CPU EPYC, on one, two" in text
    assert "2 ranks on Xeon, 25 GB" in text
    (folder / "environment.json").write_text(json.dumps({"devices": [cpu | {"name": HOSTILE}]}))
    assert HOSTILE not in _text(folder)
