"""The page of `looplm inspect --html` in a real browser, held against `looplm inspect --json`.

Skipped only where Playwright (from the package index) or Chromium (from the system) is not installed.
"""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from in_process import report_of
from looplm.kernels import exit_loop
from looplm_cli.page import build
from looplm_cli.render import finite
from tiny_models import text_run

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

PROMPT = "the cat sat </script> on\ta mat & <b>bit"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

# The contrast of every cell's text with its background, colours resolved by painting them.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => byte / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const paper = getComputedStyle(document.body).backgroundColor;
  return [...document.querySelectorAll("td.cell")].map((cell) => {
    const style = getComputedStyle(cell);
    const back = style.backgroundColor === "rgba(0, 0, 0, 0)" ? paper : style.backgroundColor;
    return contrast(luminance(style.color), luminance(back));
  });
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("page")
    text_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def page_file(folder: pathlib.Path) -> pathlib.Path:
    report(folder, 0.7, "--html", str(folder / "page.html"))
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, page_file: pathlib.Path) -> Iterator[Any]:
    """The page, freshly opened; complaints and requests are collected on it."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, color_scheme="light")
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    assert page.complaints == []
    pages = {page_file.as_uri(), page_file.with_name("made.html").as_uri()}
    assert [url for url in page.requests if not url.startswith("data:") and url not in pages] == []
    context.close()


def report(folder: pathlib.Path, q: float, *more: str) -> dict[str, Any]:
    return report_of("inspect", "-m", folder / "run", "-p", PROMPT, "--q", f"{q:g}", *more)


def show(page: Any, folder: pathlib.Path, made: dict[str, Any]) -> None:
    """Open the page of a report that no model gave."""
    (folder / "made.html").write_text(build(made), encoding="utf-8")
    page.goto((folder / "made.html").as_uri())


def eventually(page: Any, condition: str) -> None:
    """Wait for what follows a change of layout.  (The page's own policy forbids Playwright's polling, an eval.)"""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never true: {condition}")


def marks(page: Any) -> list[tuple[int, int]]:
    """(position, loop) of every exit mark."""
    read = "cells => cells.map(cell => [Number(cell.dataset.position), Number(cell.dataset.loop)])"
    return sorted(map(tuple, page.eval_on_selector_all("td.exit", read)))


def agrees(page: Any, wanted: dict[str, Any]) -> None:
    assert float(page.input_value("#q")) == wanted["q"]
    assert marks(page) == [(p["position"], p["exit_loop"]) for p in wanted["positions"]]
    assert float(page.inner_text("#mean-loops")) == pytest.approx(wanted["mean_loops"], abs=0.0051)
    assert page.inner_text("#q-value") == f"{wanted['q']:.2f}"
    unused = sum(wanted["loops"] - p["exit_loop"] for p in wanted["positions"])
    assert page.locator("td.unused").count() == unused
    shares = page.eval_on_selector_all("#summary td:nth-of-type(5)", "cells => cells.map(cell => cell.innerText)")
    assert shares == [f"{100 * loop['exits']:.0f} %" for loop in wanted["by_loop"]]


def test_the_slider_moves_marks_and_figure_as_the_command_says(page: Any, folder: pathlib.Path) -> None:
    agrees(page, report(folder, 0.7))
    box = page.locator("#q").bounding_box()
    middle = box["y"] + box["height"] / 2
    seen = set()
    page.mouse.move(box["x"] + 0.7 * box["width"], middle)
    page.mouse.down()
    for share in (0.55, 0.36, 0.88):
        page.mouse.move(box["x"] + share * box["width"], middle, steps=4)
        q = float(page.input_value("#q"))
        assert abs(q - share) < 0.05, "the slider did not follow the mouse"
        agrees(page, report(folder, q))
        seen.add(tuple(marks(page)))
    page.mouse.up()
    assert len(seen) == 3, "the marks never moved"
    page.focus("#q")
    page.keyboard.press("End")
    agrees(page, report(folder, 1.0))
    assert page.inner_text("#mean-loops") == "4.00"
    page.keyboard.press("Home")
    agrees(page, report(folder, 0.0))
    assert page.inner_text("#mean-loops") == "1.00"
    assert page.get_attribute("#q", "aria-valuetext") == "0.00, 1.00 of 4 loops on average"


def test_cells_show_the_predictions(page: Any, folder: pathlib.Path) -> None:
    wanted = report(folder, 0.7)
    cells = page.eval_on_selector_all(
        "td.cell", "all => all.map(c => [c.dataset.position, c.dataset.loop, c.innerText])"
    )
    shown = {(int(position), int(loop)): text.split("\n") for position, loop, text in cells}
    for position in wanted["positions"]:
        for loop in position["loops"]:
            token, number = shown[position["position"], loop["loop"]]
            assert token == loop["top"][0]["token"]
            share = loop["target_prob"]
            assert number == ("–" if share is None else f"{100 * share:.0f} %")
    heads = page.eval_on_selector_all("#bands thead th .token", "all => all.map(head => head.textContent)")
    assert heads == [position["token"] for position in wanted["positions"]]
    assert page.evaluate("document.scripts.length") == 2, "the prompt's </script> ended something"
    assert page.locator("#bands b").count() == 0


def test_details_follow_mouse_and_keyboard(page: Any, folder: pathlib.Path) -> None:
    position = report(folder, 0.7)["positions"][4]
    loop = position["loops"][1]
    page.hover('td[data-position="5"][data-loop="2"]')
    details = page.inner_text("#details")
    assert "Position 5, loop 2 of 4" in details
    for shown in (f"{loop['loss']:.3f} nats", f"{loop['hazard']:.3f}", f"{loop['exit_cdf']:.3f}", str(loop["rank"])):
        assert shown in details
    assert [guess["token"] for guess in loop["top"]] == page.eval_on_selector_all(
        "#details .ranking .token", "all => all.map(node => node.textContent)"
    )

    page.focus("#q")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.position") == "1", "one cell is in the order of tabs"
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    focused = page.evaluate("({...document.activeElement.dataset})")
    assert focused == {"position": "3", "loop": "3"}
    assert "Position 3, loop 3 of 4" in page.inner_text("#details")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("e, loop 3: ")
    page.keyboard.press("End")
    assert f"Position {len(PROMPT)}, loop 3 of 4" in page.inner_text("#details")
    assert page.locator('td.cell[tabindex="0"]').count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_is_readable_in_light_and_dark(page: Any, folder: pathlib.Path, scheme: str) -> None:
    shaded = report(folder, 0.7)
    cells = [loop for position in shaded["positions"] for loop in position["loops"]]
    for number, loop in enumerate(cells):
        loop["target_prob"] = (number / (len(cells) - 1)) ** 2
    page.emulate_media(color_scheme=scheme)
    show(page, folder, shaded)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in paper.removeprefix("rgb(").removesuffix(")").split(","))
    assert (brightness > 600) if scheme == "light" else (brightness < 150)
    for key in ("End", "Home"):  # all cells in use, all but the first loop's not
        page.focus("#q")
        page.keyboard.press(key)
        assert min(page.evaluate(CONTRASTS)) >= 4.5


def test_marks_are_right_to_the_last_bit_and_text_stays_text(page: Any, folder: pathlib.Path) -> None:
    made = report(folder, 0.7)
    exit_prob = np.array([[1, 0, 0, 0], [0.7, 0.1, 0.1, 0.1], [0.5, 0.25, 0.25, 0]], np.float32)
    for position, law in zip(made["positions"], exit_prob, strict=False):
        for loop, share in zip(position["loops"], law, strict=True):
            loop["exit_prob"] = finite(share)
    made["positions"][0]["token"] = "</script><script>document.title = 'broken'</script>"
    made["positions"][0]["loops"][0]["top"][0]["token"] = "<img src=x>"
    show(page, folder, made)
    for q in (0.0, 0.7, 0.75, 0.76, 1.0):
        page.fill("#q", str(q))
        (wanted,) = exit_loop(np.ascontiguousarray(exit_prob.T), q)
        assert marks(page)[:3] == [(place + 1, r + 1) for place, r in enumerate(wanted.tolist())]
    assert page.inner_text("#bands thead th .token") == made["positions"][0]["token"]
    assert "broken" not in page.title()
    assert page.locator("img").count() == 0


def test_tokens_wrap_into_bands_at_every_width_and_on_paper(page: Any) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth"
    for width, bands in ((1100, 4), (700, 6), (380, 13), (1100, 4)):
        page.set_viewport_size({"width": width, "height": 800})
        eventually(page, f"{fits} && bands.childElementCount === {bands}")
        assert page.locator("td.cell").count() == 4 * len(PROMPT)
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.is_visible("#details")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.is_visible("#bands td.exit")
