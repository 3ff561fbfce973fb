"""A page in a real browser: it opens without errors and asks for nothing, zooms, toggles, follows a run."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import later
from tests.support.recorded import append, write_run
from vimscale.report import record

page = later.module("vimscale.report.page", "bokeh")
serve = later.module("vimscale.report.serve", "bokeh")

pytestmark = pytest.mark.slow
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(_NAMES)} is on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a run that trained here and met a spike, and a recorded one."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "tests.support.injected", str(folder), "2", "spike_in_batches"]
    changes = ("guard.window=10", "guard.spike=30", "log.every=2", "evaluate.every=20", "model.backward_gate=true")
    subprocess.run([*command, *changes], cwd=Path(__file__).parents[2], check=True)
    return [folder / "run", write_run(folder / "other", 100)]


def _write(path: Path, *folders: Path) -> str:
    records = [record.read(str(folder)) for folder in folders]
    path.write_text(page.html(page.collect(records, ["not asked for"] * len(records))))
    return path.as_uri()


def _open(browser: Any, address: str, **options: Any) -> tuple[Any, list[str]]:
    """(the page when its charts are drawn, what went wrong in it and what it asked for)."""
    opened = browser.new_page(**options)
    seen: list[str] = []
    opened.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: seen.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else seen.append(asked.url))
    opened.goto(address)
    opened.wait_for_selector("html[data-ready=yes]", timeout=120_000)
    return opened, seen


def _range(opened: Any) -> list[float]:
    return opened.evaluate("(r => [r.start, r.end])(Bokeh.documents[0].get_model_by_name('over'))")


def _drag(opened: Any, key: str) -> None:
    """Drag over the middle of a chart."""
    opened.locator(f"#chart-{key}").scroll_into_view_if_needed()
    box = opened.locator(f"#chart-{key}").bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.52, steps=8)
    opened.mouse.up()
    opened.wait_for_timeout(300)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_a_page_opens_without_errors_and_without_requests(
    browser: Any, runs: list[Path], tmp_path: Path, width: int, scheme: str
) -> None:
    address = _write(tmp_path / "page.html", runs[0])
    opened, seen = _open(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert seen == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    drawn = (
        "[...document.querySelectorAll('.chart')].map(one => one.firstElementChild?.getBoundingClientRect().width ?? 0)"
    )
    widths = opened.evaluate(drawn)
    assert len(widths) >= 12
    assert min(widths) > 250
    assert opened.locator("#findings img").count() == 4 * 8
    ink = opened.evaluate("Bokeh.documents[0].roots()[0].title.text_color")
    assert ink == {"light": "#1c2024", "dark": "#e6e9ee"}[scheme]
    opened.locator("#theme").click()
    assert opened.evaluate("Bokeh.documents[0].roots()[0].title.text_color") != ink
    opened.close()


def test_charts_zoom_together_and_switch_to_hours(browser: Any, runs: list[Path], tmp_path: Path) -> None:
    opened, seen = _open(browser, _write(tmp_path / "page.html", runs[0]), viewport={"width": 1280, "height": 900})
    before = _range(opened)
    _drag(opened, "loss")
    zoomed = _range(opened)
    assert before[0] < zoomed[0] < zoomed[1] < before[1]
    assert zoomed[1] - zoomed[0] < (before[1] - before[0]) / 2
    opened.locator("[data-axis=hours]").click()
    opened.wait_for_timeout(300)
    assert _range(opened)[1] < 1
    opened.locator("[data-axis=step]").click()
    opened.wait_for_timeout(300)
    assert _range(opened) == pytest.approx(before, abs=1)
    assert seen == []
    opened.close()


def test_a_legend_and_a_runs_box_hide_series(browser: Any, runs: list[Path], tmp_path: Path) -> None:
    opened, seen = _open(browser, _write(tmp_path / "page.html", *runs), viewport={"width": 1280, "height": 900})
    shown = "Bokeh.documents[0].roots()[0].renderers.filter(one => one.visible).length"
    count = opened.evaluate(shown)
    opened.locator("#runs input").nth(1).click()
    assert opened.evaluate(shown) == count - 4
    assert opened.locator('[data-of="1"]').is_hidden()
    opened.locator("#runs input").nth(1).click()
    assert opened.evaluate(shown) == count
    legend = "Bokeh.documents[0].roots()[0].above.find(one => one.type === 'Legend')"
    where = f"(box => [box.x + 20, box.y + 12])(Bokeh.index.find_one({legend}).el.getBoundingClientRect())"
    opened.locator("#chart-loss").scroll_into_view_if_needed()
    x, y = opened.evaluate(where)
    opened.mouse.click(x, y)
    opened.wait_for_timeout(300)
    assert opened.evaluate(shown) == count - 1
    assert seen == []
    opened.close()


def test_a_served_page_follows_the_run_and_keeps_its_zoom(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "growing", 50)

    def collect() -> Any:
        return page.collect([record.read(str(folder))], ["not asked for"])

    with serve.Server(serve.Reports([folder], collect), 0, "secret") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            opened, seen = _open(browser, server.address, viewport={"width": 1280, "height": 900})
            _drag(opened, "loss")
            zoomed = _range(opened)
            append(folder, {"kind": "train", "step": 51, "loss": 0.1, "lr": 1e-3})
            opened.wait_for_selector("#summary:has-text('51 of 60 steps')", timeout=60_000)
            last = "Bokeh.documents[0].get_model_by_name('steps0').data.step.at(-1)"
            assert opened.evaluate(last) == 51
            assert _range(opened) == zoomed
            assert {url for url in seen if not url.startswith(server.address)} == set()
            opened.close()
        finally:
            server.shutdown()
            thread.join()
