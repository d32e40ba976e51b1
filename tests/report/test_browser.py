"""The page in headless Chromium: fits a phone and a desk, sorts, says no error, asks for nothing, light and dark.

Run by `make browser`. Every check is a function that is shown to fail on a page with the fault that it looks for.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saap_jax.evaluation.rank_correlation import MEASURES, Fidelity
from saap_jax.report.page.html import policy
from saap_jax.report.write import write_reports
from saap_jax.runs.directory import RunDirectory
from tests.report.sweeps import write_run
from tests.report.test_score_page import NAMES, invented, kept

pytestmark = pytest.mark.browser

WIDTHS, SCHEMES = (390, 800, 1440), ("light", "dark")
PAGES = ("one", "three", "kinds")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A comparison of 60 candidates; three of 16; a comparison beside a score run and a fidelity run."""
    directory = tmp_path_factory.mktemp("runs")
    runs = [write_run(directory / f"sweep-{number}", number, 16) for number in range(3)]
    scored = kept(directory / "scored", invented(NAMES, ("web", "code")), fused=True)
    scored.update(status="finished")
    judged = RunDirectory.open(directory / "judged", {"channels_per_layer": 4})
    rows = [
        Fidelity(name, scope, measure, 90, value, value - 0.2, value + 0.1)
        for scope in ("attention", "mlp", "pooled")
        for name, value in (("gate_fisher", 0.8), ("taylor_element(reduction='max')", 0.1), ("random", -0.05))
        for measure in MEASURES
    ]
    judged.save_json("fidelity", [row._asdict() for row in rows])
    judged.update(kind="fidelity", status="finished")
    of = {"one": [write_run(directory / "large", 7, 60)], "three": runs, "kinds": [runs[0], scored.path, judged.path]}
    return {name: write_reports(paths, directory / f"{name}.html")[0] for name, paths in of.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which(os.environ.get("SAAP_CHROMIUM", "chromium"))
    assert chromium, "expected Chromium on the path, or the command that SAAP_CHROMIUM names"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, width: int = 1440, scheme: str = "light") -> Iterator[Any]:
    """Open a page with all runs unfolded; `page.asked` and `page.faults` list its requests and errors."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    try:
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        page.wait_for_timeout(50)
        yield page
    finally:
        context.close()


def spoiled(path: Path, tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """Return a copy of a page with a fault in it, whose policy allows its style and script as they are now."""
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    style, script = (re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)[-1] for tag in ("style", "script"))
    text = re.sub('(?<=http-equiv="Content-Security-Policy" content=").*?(?=">)', policy(style, script), text)
    copy = tmp_path / "spoiled.html"
    copy.write_text(text)
    return copy


def asked_outside(page: Any, path: Path) -> list[str]:
    """Return the requests other than for the page itself and for what it holds."""
    return [url for url in page.asked if url != path.as_uri() and not url.startswith("data:")]


POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


class TestEveryPage:
    @pytest.mark.parametrize("name", PAGES)
    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_fits_and_is_readable(self, browser, pages, name, width, scheme):
        with opened(browser, pages[name], width, scheme) as page:
            assert overflow(page) == []
            assert faint_texts(page) == []
            assert small_texts(page) == []
            assert overlaps(page) == []
            assert page.faults == []
            assert asked_outside(page, pages[name]) == []

    def test_is_dark_where_that_is_asked_for(self, browser, pages):
        seen = []
        for scheme in SCHEMES:
            with opened(browser, pages["one"], scheme=scheme) as page:
                colours = page.evaluate(
                    "['color', 'backgroundColor'].map(each => getComputedStyle(document.body)[each])"
                )
                seen.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours])
        (ink, paper), (light_ink, dark_paper) = seen
        assert ink < 200 < 600 < paper
        assert dark_paper < 200 < 600 < light_ink

    def test_prints_and_works_without_its_script(self, browser, pages, tmp_path):
        text = pages["one"].read_text()
        (tmp_path / "plain.html").write_text(re.sub("<script>.*?</script>", "", text, flags=re.S))
        with opened(browser, tmp_path / "plain.html") as page:
            assert page.locator("table.sortable tbody tr").count() == 61


class TestChecksCanFail:
    """The same checks on pages with one fault each."""

    @pytest.mark.parametrize("width", WIDTHS)
    def test_something_too_wide(self, browser, pages, tmp_path, width):
        wide = spoiled(pages["one"], tmp_path, ("<h1>", '<div style="width: 2000px">x</div><h1>'))
        with opened(browser, wide, width) as page:
            assert len(overflow(page)) == 1

    @pytest.mark.parametrize(("scheme", "colour"), [("light", "#888"), ("dark", "#666")])
    def test_faint_text(self, browser, pages, tmp_path, scheme, colour):
        faint = spoiled(pages["one"], tmp_path, ("</style>", f".about {{ color: {colour}; }}</style>"))
        with opened(browser, faint, scheme=scheme) as page:
            assert any("compare" in text for text in faint_texts(page))

    def test_small_text(self, browser, pages, tmp_path):
        small = spoiled(pages["one"], tmp_path, ("</style>", ".plot text { font-size: 6px !important; }</style>"))
        with opened(browser, small, 390) as page:
            assert small_texts(page)

    def test_overlapping_labels(self, browser, pages, tmp_path):
        large = spoiled(pages["one"], tmp_path, ("</style>", ".plot text { font-size: 40px !important; }</style>"))
        with opened(browser, large) as page:
            assert overlaps(page)

    def test_an_error_in_the_script(self, browser, pages, tmp_path):
        for fault in ("console.error('here')", "nothing.there()"):
            broken = spoiled(pages["one"], tmp_path, ("</script>", f"{fault}</script>"))
            with opened(browser, broken) as page:
                assert len(page.faults) == 1

    def test_a_script_that_is_not_the_page_s_own(self, browser, pages, tmp_path):
        foreign = spoiled(pages["one"], tmp_path, ("<h1>", "<script>document.title = 'taken'</script><h1>"))
        with opened(browser, foreign) as page:
            assert len(page.faults) == 1, "the page's policy does not let it run, and says so"
            assert page.title() != "taken"

    def test_a_request(self, browser, pages, tmp_path):
        image = ("<h1>", '<img src="other.png" alt=""><h1>')
        asking = spoiled(pages["one"], tmp_path, image)
        with opened(browser, asking) as page:
            assert len(page.faults) == 1, "the page's own policy does not let it ask, and says so"
        policy = POLICY.search(pages["one"].read_text())
        assert policy is not None
        asking = spoiled(pages["one"], tmp_path, image, (policy[0], ""))
        with opened(browser, asking) as page:
            assert [url.rpartition("/")[2] for url in asked_outside(page, asking)] == ["other.png"]


def column(page: Any, index: int) -> list[str]:
    """Return the cells of a column of the first sortable table, as they stand."""
    rows = "document.querySelector('table.sortable').tBodies[0].rows"
    return page.evaluate(f"[...{rows}].map(row => row.cells[{index}].textContent)")


def number(text: str) -> float:
    """Return the number that a cell begins with; NaN where there is none."""
    found = re.match(r"[+\u2212×]?\s*([\d,.]+(?:e\d+)?)", text)
    if found is None:
        return math.nan
    value = float(found[1].replace(",", ""))
    return -value if text.startswith("\u2212") else value


def ascending(values: list[float]) -> bool:
    known = [value for value in values if not math.isnan(value)]
    return known == sorted(known) and all(map(math.isnan, values[len(known) :]))


class TestSorting:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_by_number_and_back(self, browser, pages, width):
        with opened(browser, pages["one"], width) as page:
            heads = page.locator("table.sortable").first.locator("thead button")
            for index in (1, 2, 7):  # perplexities, and a difference
                assert not ascending([number(text) for text in column(page, index)])
                heads.nth(index).click()
                up = [number(text) for text in column(page, index)]
                assert ascending(up)
                assert len(up) == 61
                heads.nth(index).click()
                down = [number(text) for text in column(page, index)]
                known = [value for value in down if not math.isnan(value)]
                assert ascending(known[::-1])
                assert all(map(math.isnan, down[len(known) :])), "what is no number is last either way"
                state = page.locator("table.sortable").first.locator("thead th").nth(index).get_attribute("aria-sort")
                assert state == "descending"

    def test_by_name_and_by_key(self, browser, pages):
        with opened(browser, pages["one"]) as page:
            heads = page.locator("table.sortable").first.locator("thead button")
            heads.nth(0).focus()
            page.keyboard.press("Enter")
            names = column(page, 0)
            assert names == page.evaluate("names => [...names].sort((a, b) => a.localeCompare(b))", names)
            assert [text for text in names if text.startswith("dense")] == ["dense"]

    def test_numbers_are_no_words(self, browser, pages):
        """As words, the order would be another one: the test above sees the difference."""
        with opened(browser, pages["one"]) as page:
            values = [text for text in column(page, 7) if not math.isnan(number(text))]
            assert not ascending([number(text) for text in sorted(values)])

    def test_without_the_script_nothing_is_sorted(self, browser, pages, tmp_path):
        broken = spoiled(pages["one"], tmp_path, ("body.append(...rows);", ""))
        with opened(browser, broken) as page:
            page.locator("table.sortable").first.locator("thead button").nth(2).click()
            assert not ascending([number(text) for text in column(page, 2)])

    def test_only_the_table_that_is_clicked(self, browser, pages):
        with opened(browser, pages["three"]) as page:
            tables = page.locator("table.sortable")
            before = tables.nth(1).inner_text()
            tables.first.locator("thead button").nth(3).click()
            assert tables.nth(1).inner_text() == before


class TestCopying:
    def test_a_click_copies_or_selects_the_text(self, browser, pages):
        with opened(browser, pages["one"]) as page:
            button, code = page.locator("button.copy").last, page.locator(".code").last.text_content()
            button.click()
            page.wait_for_timeout(100)
            assert button.text_content() in ("copied", "selected")
            if button.text_content() == "selected":
                assert page.evaluate("getSelection().toString()").strip() == code.strip()
            assert page.locator("button.copy").count() == page.locator(".code").count() > 1

    def test_without_the_script_there_is_no_button(self, browser, pages, tmp_path):
        (tmp_path / "plain.html").write_text(re.sub("<script>.*?</script>", "", pages["one"].read_text(), flags=re.S))
        with opened(browser, tmp_path / "plain.html") as page:
            assert page.locator("button.copy").count() == 0
            assert page.locator(".code").count() > 1


def test_a_link_opens_the_run_that_it_leads_to(browser, pages):
    with opened(browser, pages["three"]) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = false)")
        page.locator("table.sortable a", has_text="sweep-1").first.click()
        page.wait_for_timeout(100)
        assert page.evaluate("[...document.querySelectorAll('details.run')].map(each => each.open)") == [
            False, True, False,
        ]  # fmt: skip


# --- checks --------------------------------------------------------------------------------------


def overflow(page: Any) -> list[str]:
    """Return what is wider than the window, but for what scrolls within a region of its own."""
    return page.evaluate(
        """() => document.documentElement.scrollWidth <= innerWidth ? [] :
        [...document.querySelectorAll('body *')].filter(each => !each.closest('.scroll') && !each.children.length
            && each.getBoundingClientRect().right > innerWidth + 0.5).map(each => each.outerHTML.slice(0, 80))"""
    )


def faint_texts(page: Any) -> list[str]:
    """Return texts whose contrast with what lies behind them is below 4.5, or 3 where they are large."""
    return page.evaluate(
        """() => {
        const parse = colour => {
            const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
            return colour.startsWith('color(') ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
        };
        const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3])).concat(1);
        const behind = each => {
            const own = parse(getComputedStyle(each).backgroundColor);
            return own[3] === 1 ? own : over(own, each.parentElement ? behind(each.parentElement) : [255, 255, 255, 1]);
        };
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92
            : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
            const each = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
            if (!text || each.closest('script, style, title, desc, defs') || !each.getClientRects().length) continue;
            const style = getComputedStyle(each), svg = each.closest('svg text');
            const ink = parse(svg ? style.fill : style.color);
            if (svg) ink[3] *= Number(style.fillOpacity);
            const paper = behind(each.closest('svg')?.parentElement ?? each);
            const [high, low] = [light(over(ink, paper)), light(paper)].sort((a, b) => b - a);
            const size = parseFloat(style.fontSize);
            const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
            if ((high + 0.05) / (low + 0.05) < (large ? 3 : 4.5)) found.push(text.slice(0, 60));
        }
        return found;
    }"""
    )


def small_texts(page: Any, least: float = 8.9) -> list[str]:
    """Return texts that are smaller on the screen than so many pixels, drawings as they are scaled."""
    return page.evaluate(
        """least => [...document.querySelectorAll('body *')].filter(each => {
            if (each.closest('script, style, title, desc, defs, details:not([open])')) return false;
            if (![...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) return false;
            const matrix = each.closest('svg text')?.getScreenCTM();
            const scale = matrix ? Math.hypot(matrix.a, matrix.b) : 1;
            return parseFloat(getComputedStyle(each).fontSize) * scale < least;
        }).map(each => each.textContent.trim().slice(0, 60))""",
        least,
    )


def overlaps(page: Any) -> list[str]:
    """Return pairs of labels of a plot, or of ticks of an axis, that lie on each other."""
    return page.evaluate(
        """() => {
        const found = [];
        for (const each of document.querySelectorAll('.plot, .ticks')) {
            const labels = [...each.querySelectorAll('text, span')];
            const boxes = labels.map(label => [label.textContent, label.getBoundingClientRect()]);
            boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (wide > 1 && high > 0.3 * Math.min(p.height, q.height)) found.push(`${a} on ${b}`);
            }));
        }
        return found;
    }"""
    )
