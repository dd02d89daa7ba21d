"""The page of `looplm sweep --html` in a real browser, held against `looplm sweep --json`.

Skipped only where Playwright (from the package index) or Chromium (from the system) is not installed.
"""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from in_process import report_of
from looplm_cli import page as pages
from tiny_models import text_run

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = text_run(tmp_path_factory.mktemp("sweep") / "run")
    return report_of(
        "sweep", "-m", model, "--turns", 1, "--decode-tokens", 3, "--steps", 3, "--points", 3, "--chunks", 3
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_every_point_and_follows_mouse_and_keys(
    report: dict[str, Any], browser: Any, tmp_path: pathlib.Path, scheme: str
) -> None:
    (tmp_path / "sweep.html").write_text(pages.build_sweep(report), encoding="utf-8")
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(f"file://{tmp_path}/sweep.html")
    points = [p for entry in report["entries"] for p in entry["points"]]
    assert page.locator("#plot circle").count() == len(points)
    assert page.locator("#plot polyline").count() == len(report["entries"])
    assert page.locator("#claims li").count() == 4
    assert page.locator("#budgets tbody tr").count() == len(report["budgets"])

    page.focus("#plot circle[tabindex='0']")
    assert f"fixed: {report['entries'][0]['points'][0]['exit']}" in page.inner_text("#details")
    page.keyboard.press("ArrowRight")
    assert f"fixed: {report['entries'][0]['points'][1]['exit']}" in page.inner_text("#details")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#details h3").startswith("change: ")
    page.locator("#plot circle").last.hover(force=True)
    assert page.inner_text("#details h3").startswith("gate, best-later: ")

    page.select_option("#cost", "ms_per_token")
    page.select_option("#worth", "agreement")
    assert page.locator("#plot circle").count() == len(points)
    page.uncheck("#entries li:first-child input")
    assert page.locator("#plot circle").count() == len(points) - len(report["entries"][0]["points"])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert complaints == []
    page.close()


def test_intervals_stay_inside_the_plot(report: dict[str, Any], browser: Any, tmp_path: pathlib.Path) -> None:
    """Clipped at its edges, and left out where they are taller than all of it."""
    points = [point for entry in report["entries"] for point in entry["points"]]
    losses = [point["loss"] for point in points]
    height = max(losses) - min(losses)
    for number, point in enumerate(points):
        point["intervals"]["loss"] = (0.1, 9.0)[number % 2] * height
    (tmp_path / "sweep.html").write_text(pages.build_sweep(report), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(f"file://{tmp_path}/sweep.html")
    grid = page.locator("#plot line.grid").first
    top, bottom = float(grid.get_attribute("y1")), float(grid.get_attribute("y2"))
    bars = page.locator("#plot line.spread").all()
    assert len(bars) == (len(points) + 1) // 2
    for bar in bars:
        assert top <= float(bar.get_attribute("y2")) < float(bar.get_attribute("y1")) <= bottom
    page.close()
