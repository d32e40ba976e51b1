"""The page: self-contained, complete, escaped, and made for runs that are not finished too."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saap_jax.report import csv_table, render_report, write_report
from saap_jax.report.kinds.compare import read_compared
from saap_jax.report.kinds.variants import cut_table, summary
from saap_jax.report.kinds.views import read_view
from saap_jax.report.page.blocks import Detail
from saap_jax.report.page.html import render_page
from saap_jax.report.write import report_page
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runs.standing import ComparisonRow, comparison_rows, leading
from tests.report import conftest as fake
from tests.report.sweeps import write_run

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


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


def sortable_rows(text: str) -> list[list]:
    """Return the lines of the first sortable table by what its script sorts: the name, then numbers."""
    body = re.search(r'<table class="w1 sortable">.*?<tbody>(.*?)</tbody>', text, re.S)
    assert body is not None
    rows = []
    for line in body[1].split("</tr>")[:-1]:
        cells = re.findall(r'<t[hd](?: scope="row")?(?: data-key="([^"]*)")?>(.*?)</t[hd]>', line)
        first, *others = [key or shown for key, shown in cells]
        rows.append([first, *(math.nan if value in ("-", "n/a") else float(value) for value in others)])
    return rows


@pytest.fixture
def page(run) -> Page:
    return Page(render_report(run.path))


class TestPage:
    def test_needs_no_network(self, run, page):
        text = render_report(run.path)
        assert set(re.findall(r"https?://[^\"'\s<)]*", text)) == {"http://www.w3.org/2000/svg"}
        assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)", text))
        assert "@import" not in text
        assert page.of("link") == page.of("img") == page.of("iframe") == []
        assert all("src" not in attrs for attrs in page.of("script"))
        assert all(attrs["href"].startswith(("data:text/csv;", "#")) for attrs in page.of("a"))

    def test_allows_its_own_style_and_script_and_no_other(self, run, page):
        text = render_report(run.path)
        [policy] = [attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs]
        sources = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert (sources["default-src"], sources["img-src"]) == ("'none'", "data:")
        for tag, rule in (("style", "style-src-elem"), ("script", "script-src")):
            [content] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert sources[rule] == f"'sha256-{digest}'"

    def test_shows_every_candidate_with_what_it_is_sorted_by(self, run):
        rows = sortable_rows(render_report(run.path))
        assert len(rows) == 17
        for line in run.candidates():
            row = next(r for r in rows if r[0].split()[0] == line["estimator"] and r[3] == 100 * line["ratio_asked"])
            assert row[4] == pytest.approx(line["ratio_actual"], rel=1e-6)
            for value, name in zip(row[1:3], fake.METRICS, strict=True):
                assert value == pytest.approx(line["ppl"][name], rel=1e-6, nan_ok=True)
        heads = Page(render_report(run.path)).of("th")
        assert [attrs["aria-sort"] for attrs in heads if "aria-sort" in attrs] == ["none"] * 10

    def test_marks_the_best_row_of_each_ratio(self, page):
        assert [attrs.get("class") for attrs in page.of("tr")].count("best") == 2 + 2, (
            "in the table, and in the intervals"
        )

    def test_holds_the_figures_with_their_alternatives(self, run, page):
        figures = page.of("svg")
        seen = [attrs for attrs in figures if attrs.get("aria-hidden") != "true"]
        assert all(attrs["role"] == "img" for attrs in seen)
        titles = [text for tag, text in page.texts if tag == "title"][1:]
        plots = [attrs for attrs in seen if attrs.get("class") == "plot"]
        assert len({attrs["aria-label"] for attrs in plots}) == len(plots) == 2
        heats = [attrs for attrs in seen if attrs.get("class") == "heat"]
        assert len(heats) == 2 * 16, "a variant and ratio has a cell of heat for each structure"
        for line in run.candidates():
            said = f"{line['estimator']}, mlp: of 1536 each layer keeps {' '.join(map(str, line['kept']['mlp']))}"
            assert said in titles

    def test_identifiers_are_unique_and_references_resolve(self, page):
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)

    def test_offers_the_csv(self, run, page):
        (link,) = [attrs for attrs in page.of("a") if "download" in attrs]
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


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "sweep", 0, 60)


class TestSections:
    """A run with all records of this version."""

    @pytest.mark.slow
    def test_follow_each_other(self, path):
        page = Page(render_report(path))
        heads = [attrs["id"] for attrs in page.of("h2")]
        assert heads == [
            "summary", "frontier", "suggestions", "comparison", "intervals", "kept", "scores", "fusion", "cut",
            "stages", "reproduce",
        ]  # fmt: skip
        assert [attrs["href"] for attrs in page.of("a") if "download" not in attrs] == [f"#{id}" for id in heads]

    @pytest.mark.slow
    def test_say_what_figures_leave_out(self, path):
        text = render_report(path)
        assert text.count("10 more variants in the table of all.") == 1 + 2, "a frontier, a map a ratio"
        assert text.count("9 more variants in the table of all.") == 2, "the best is no line of the intervals"
        brief = render_page(report_page([read_view(path, Detail(6, drawn=False, downloads=False))], folded=False))
        assert brief.count("24 more variants in the table of all.") == 3
        assert len(sortable_rows(brief)) == len(sortable_rows(text)) == 61

    @pytest.mark.slow
    def test_show_differences_that_are_those_of_the_intervals(self, path):
        compared = read_compared(path, read_run(path))
        out = {(one.label, one.asked): one for one in compared.against if one.domain == "out"}
        assert len(out) == 58
        for row in sortable_rows(render_report(path))[1:]:
            name = row[0].replace("<wbr>", "").removesuffix(" *").removesuffix(" ≈")
            one = out.get((name, row[3] / 100))
            if one is None:
                assert math.isnan(row[7])
            else:
                assert row[7] == pytest.approx(one.difference.value, rel=1e-6)
                assert row[8] == round(100 * one.difference.win_rate)
                assert row[9] == pytest.approx(one.p_value, rel=1e-6)
                assert row[0].endswith(" ≈") == one.tied

    def test_an_older_run_says_that_it_has_no_intervals(self, run, older_run):
        said = "this run did not record the losses of its windows"
        assert said in render_report(older_run.path)
        assert said not in render_report(run.path), "negative control"


class TestOddRuns:
    def test_escapes_names_everywhere(self, tmp_path):
        odd = '<script>alert("x")</script>&'
        run = RunDirectory.open(tmp_path / "odd", {"name": odd})
        fields = fake.fields()
        fields["model"]["name"] = fields["best"]["candidate"] = odd
        fields["metrics"] = [{"name": odd, "domain": "in"}]
        fields["dense"] |= {"ppl": {odd: 2.0}, "losses": {}}
        with run.stage(odd):
            pass
        run.append({**fake.candidate(odd, 0.2, (1.0, 1.0)), "ppl": {odd: 3.0}, "losses": {}})
        run.update(name=odd, **fields)
        text = render_report(run.path)
        page = Page(text)
        assert len(page.of("script")) == 1  # our own
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert" in text

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
        lines = [fake.older(fake.candidate(*each)) for each in (("a", 0.2, (30.0, 66.0)), ("b", 0.2, (40.0, 60.0)))]
        run = fake.fields() | {"best": {}}
        assert summary(run, comparison_rows(run, lines)) == [
            "At 20 % asked, b has the lowest perplexity out of domain, 60.00 (dense 34.70), 9.1 % below a (66.00); "
            "a has the lowest perplexity in domain, 30.00 (dense 22.40), 25.0 % below b (40.00). Nothing is tested: "
            "the losses of windows are not on record."
        ]

    def test_says_when_nothing_is_finite(self):
        lines = [fake.candidate("a", 0.2, (math.inf, math.nan))]
        run = fake.fields() | {"best": {}}
        (said,) = summary(run, comparison_rows(run, lines))
        assert said == (
            "At 20 % asked, no variant has a finite perplexity out of domain; "
            "no variant has a finite perplexity in domain."
        )

    def test_says_what_the_cut_saves(self):
        said = summary(fake.fields(), comparison_rows(fake.fields(), fake.candidates()))[-1]
        assert "gate_fisher@0.2" in said
        assert "parameters (M) 134.5 to 113.0 (−16.0 %)" in said

    def test_names_what_cannot_be_told_apart_from_the_best(self):
        def row(label: str, ppl: float, p: float = math.nan) -> ComparisonRow:
            none = math.nan
            return ComparisonRow(
                f"{label}@0.2", label, 0.2, 0.2, 1.0, ppl, ppl, none, none, 1, label == "a", p, windows=24
            )

        rows = [row("a", 10.0), *(row(f"t{number}", 11.0, 0.5) for number in range(5)), row("b", 12.0, 0.01)]
        (said,) = summary({"metrics": [{"name": "m", "domain": "out"}]}, rows)
        assert said == (
            "At 20 % asked, a has the lowest perplexity out of domain, 10.00, and 5 others cannot be told apart from "
            "it: t0, t1, t2 and 2 more."
        )
        (said,) = summary({"metrics": [{"name": "m", "domain": "out"}]}, [rows[0], rows[-1]])
        assert said == "At 20 % asked, a is best out of domain with perplexity 10.00, 16.7 % below b (12.00)."
        (said,) = summary({"metrics": [{"name": "m", "domain": "out"}]}, [rows[0], row("b", 12.0)])
        assert "best" not in said, "b was not tested: a loss of it is not finite, for instance"

    def test_a_figure_that_is_not_known_has_no_place_in_the_order(self):
        def row(label: str, first: float, second: float) -> ComparisonRow:
            none = math.nan
            return ComparisonRow(
                f"{label}@0.2", label, 0.2, 0.2, 1.0, first, second, none, none, 1, label == "x", none, windows=24
            )

        metrics = [{"name": "m", "domain": "out"}, {"name": "n", "domain": "in"}]
        rows = [row("x", 60.0, 40.0), row("y", math.nan, 41.0), row("z", 50.0, 42.0)]
        assert (
            "z has the lowest perplexity in domain, 50.00, 16.7 % below x (60.00)"
            in summary({"metrics": metrics}, rows)[0]
        )

    def test_compares_masks_with_cuts(self):
        notes = cut_table(fake.fields()).notes
        assert notes[0] == "Compiled as 27 segments of neighbouring equal layers."
        assert "8.7e-09" in notes[1]
        assert cut_table({}).notes == []


def test_the_leading_are_the_best_of_every_ratio_first():
    lines = [fake.candidate(name, ratio, (1.0, ppl)) for name, ratio, ppl in (
        ("a", 0.2, 1.0), ("b", 0.2, 2.0), ("c", 0.2, 3.0), ("c", 0.5, 4.0), ("b", 0.5, 5.0), ("a", 0.5, 6.0),
        ("d", 0.2, 9.0),
    )]  # fmt: skip
    rows = comparison_rows(fake.fields(), lines)
    assert leading(rows, 2) == ["c", "a"], "the best of 50 % and of 20 %"
    assert leading(rows, 9) == ["c", "b", "a", "d"], "in the order of the highest ratio"
    assert leading([], 9) == []
