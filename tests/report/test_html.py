"""The page: self-contained, complete, escaped, and made for runs that are not finished too."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest

from saap_jax.report import csv_table, render_report, write_report
from saap_jax.report.html import cut_notes, summary
from saap_jax.report.records import RunDirectory
from saap_jax.report.rows import comparison_rows
from tests.report import conftest as fake

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Reads a page; refuses tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack:
            self.texts.append((self.stack[-1], data))

    def of(self, tag: str) -> list[dict]:
        return [attrs for found, attrs in self.tags if found == tag]


@pytest.fixture
def page(run) -> Page:
    return Page(render_report(run.path))


class TestPage:
    def test_needs_no_network(self, run, page):
        text = render_report(run.path)
        assert set(re.findall(r"https?://[^\"'\s<)]*", text)) == {"http://www.w3.org/2000/svg"}
        assert "url(" not in text
        assert "@import" not in text
        assert page.of("link") == page.of("img") == page.of("iframe") == []
        assert all("src" not in attrs for attrs in page.of("script"))
        assert all(attrs["href"].startswith("data:text/csv;") for attrs in page.of("a"))

    def test_shows_every_candidate_with_values_to_sort_by(self, run, page):
        table = [attrs["data-value"] for tag, attrs in page.tags if tag in {"th", "td"} and "data-value" in attrs]
        rows = [table[i : i + 6] for i in range(0, len(table), 6)]
        assert len(rows) == 17
        for line in run.candidates():
            row = next(r for r in rows if r[0] == line["estimator"] and float(r[1]) == line["ratio_asked"])
            assert float(row[2]) == line["ratio_actual"]
            for value, name in zip(row[4:6], fake.METRICS, strict=True):
                assert float(value) == line["ppl"][name] or (value == "nan" and math.isnan(line["ppl"][name]))
        assert [attrs["aria-sort"] for attrs in page.of("th") if "aria-sort" in attrs] == ["none"] * 6

    def test_marks_the_best_row_of_each_ratio(self, page):
        assert [attrs.get("class") for attrs in page.of("tr")].count("best") == 2

    def test_holds_the_figures_with_their_alternatives(self, page):
        figures = page.of("svg")
        assert [attrs["role"] for attrs in figures] == ["img"] * 4
        assert len({attrs["aria-label"] for attrs in figures}) == 4

    def test_identifiers_are_unique_and_references_resolve(self, page):
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)

    def test_offers_the_csv(self, run, page):
        (link,) = page.of("a")
        text = base64.b64decode(link["href"].partition("base64,")[2]).decode()
        assert text == csv_table(run.record, run.candidates())

    def test_tells_how_to_reproduce(self, page):
        config = json.loads(next(text for tag, text in page.texts if tag == "pre"))
        assert config == {**fake.CONFIG, "limit": "Infinity"}
        facts = [text for tag, text in page.texts if tag == "dd"]
        assert fake.fields()["git_commit"] in facts
        assert "1 x cpu (cpu)" in facts

    def test_lists_stages(self, page):
        cells = [text.strip() for tag, text in page.texts if tag == "th"]
        assert {"load", "observe"} <= set(cells)

    def test_is_written_whole(self, run):
        path = write_report(run.path)
        assert path.read_text() == render_report(run.path)
        assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


class TestOddRuns:
    def test_escapes_names_everywhere(self, tmp_path):
        odd = '<script>alert("x")</script>&'
        run = RunDirectory.open(tmp_path / "odd", {"name": odd})
        fields = fake.fields()
        fields["model"]["name"] = fields["best"]["candidate"] = odd
        fields["metrics"] = [{"name": odd, "domain": "in"}]
        fields["dense"]["ppl"] = {odd: 2.0}
        with run.stage(odd):
            pass
        run.append({**fake.candidate(odd, 0.2, (1.0, 1.0)), "ppl": {odd: 3.0}})
        run.update(name=odd, **fields)
        text = render_report(run.path)
        page = Page(text)
        assert len(page.of("script")) == 1  # our own
        assert "<script>alert" not in text
        assert any(odd in attrs.get("data-value", "") for attrs in page.of("th"))

    def test_a_run_that_has_only_begun(self, tmp_path):
        run = RunDirectory.open(tmp_path / "begun", {}).begin()
        page = Page(render_report(run.path))
        assert any("No candidate is finished yet." in text for _, text in page.texts)
        assert page.of("table") == page.of("svg") == []

    def test_counts_torn_lines(self, run):
        assert "unreadable" not in render_report(run.path)
        with open(run.path / "metrics.jsonl", "a") as file:
            file.write('{"candidate": "x')
        assert "1 unreadable line of metrics.jsonl" in render_report(run.path)

    def test_a_directory_without_a_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no run\.json in"):
            render_report(tmp_path)


class TestSummary:
    def test_names_the_best_of_each_domain_and_the_gap(self):
        lines = [fake.candidate("a", 0.2, (30.0, 66.0)), fake.candidate("b", 0.2, (40.0, 60.0))]
        run = fake.fields() | {"best": None}
        assert summary(run, comparison_rows(run, lines)) == [
            "At 20 % asked, b is best out of domain with perplexity 60.00 (dense 34.70), 9.1 % below a (66.00); "
            "a is best in domain with perplexity 30.00 (dense 22.40), 25.0 % below b (40.00)."
        ]

    def test_says_when_nothing_is_finite(self):
        lines = [fake.candidate("a", 0.2, (math.inf, math.nan))]
        run = fake.fields() | {"best": None}
        (said,) = summary(run, comparison_rows(run, lines))
        assert said == (
            "At 20 % asked, no variant has a finite perplexity out of domain; "
            "no variant has a finite perplexity in domain."
        )

    def test_says_what_the_cut_saves(self):
        said = summary(fake.fields(), comparison_rows(fake.fields(), fake.candidates()))[-1]
        assert "gate_fisher@0.2" in said
        assert "parameters (M) 134.5 to 113.0 (-16.0 %)" in said

    def test_compares_masks_with_cuts(self):
        notes = cut_notes(fake.fields())
        assert notes[0] == "Compiled as 27 runs of neighbouring equal layers."
        assert "8.7e-09" in notes[1]
        assert cut_notes({}) == []
