"""The page in headless Chromium: fits a phone and a desk, says no error, asks for nothing, light and dark.

Run by `make browser`. Every check is a function that is shown to fail on a page with the fault that it looks for.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saap_jax.report.write import write_reports
from tests import fake_runs as fake

pytestmark = pytest.mark.browser

WIDTHS, SCHEMES = (390, 768, 1280), ("light", "dark")

LUMINANCE = """
(selector) => [...document.querySelectorAll(selector)].map((each) => {
  const style = getComputedStyle(each), paint = each.tagName === 'text' ? style.fill : style.color;
  const [r, g, b] = paint.match(/[\\d.]+/g).map(Number);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
})
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """The page of a comparison of names that are long, and of several runs."""
    directory = tmp_path_factory.mktemp("runs")
    long = [{**line, "variant": f"{line['variant']} > {'within(protect=(0.13, -0.07)) > ' * 3}scales(steps=48)"}
            for line in fake.candidates()]  # fmt: skip
    runs = [fake.kept_run(directory / "long", long, command="saap compare " + "--option value " * 40).path]
    runs += [fake.kept_run(directory / f"run-{number}").path for number in range(3)]
    return [write_reports(runs[:1], directory / "one.html")[0], write_reports(runs, directory / "four.html")[0]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which(os.environ.get("SAAP_CHROMIUM", "chromium"))
    assert chromium, "expected Chromium on the path, or the command that SAAP_CHROMIUM names"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def faults(browser: Any, path: Path, width: int, scheme: str) -> list[str]:
    """Return what is wrong with a page: requests, errors, overflow, letters that nobody can read."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url) if request.url.startswith("http") else None)
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    if page.evaluate("document.documentElement.scrollWidth") > width:
        found.append("wider than the screen")
    letters = page.evaluate(LUMINANCE, "main, p, td, th, h2, svg text")
    if not letters or not all(each < 0.5 if scheme == "light" else each > 0.5 for each in letters):
        found.append("letters of the wrong colour")
    page.close()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_are_read_and_ask_for_nothing(pages, browser, width, scheme):
    for path in pages:
        assert faults(browser, path, width, scheme) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("<main>", '<main><p style="width: 900px; max-width: none">wide</p>', "wider than the screen"),
        ('svg [style*="fill: #010203"]', "svg nothing", "letters of the wrong colour"),
        ("<main>", "<main><script>1</script>", "violates"),
    ],
)
def test_faults_are_found(pages, browser, tmp_path, old, new, fault):
    """The negative control: a page with each fault."""
    text = pages[0].read_text()
    assert old in text
    (tmp_path / "page.html").write_text(text.replace(old, new, 1))
    assert fault in " ".join(faults(browser, tmp_path / "page.html", 390, "dark"))


def test_a_link_opens_the_run_that_it_leads_to(pages, browser):
    page = browser.new_page()
    page.goto(f"{pages[1].as_uri()}#run-2-comparison".replace("comparison", "Comparison"))
    assert page.evaluate("document.querySelectorAll('details.run')[1].open")
    assert not page.evaluate("document.querySelectorAll('details.run')[0].open"), "negative control"
    page.close()
