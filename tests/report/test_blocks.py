"""Every block in every form: the same rows in terminal, Markdown, CSV and HTML, all names escaped."""

import csv
import html
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from saap_jax.report.blocks import Code, Column, Figure, Page, Section, Table, View, Words, facts
from saap_jax.report.figures import inline
from saap_jax.report.formats import format_difference, format_percent
from saap_jax.report.render import markdown_report, markdown_text, render_page, table_csv
from tests.report.shown import cells, printed

ODD = '<b>&"x"</b> | [y](z) `c` *d* _e_ =1+1'
COLUMNS = (
    Column("name", ("name", "best"), lambda name, best: f"{name} *" if best else name, words=True),
    Column("removed %", ("ratio",), format_percent),
    Column("Δ %", ("change", "low", "high"), format_difference, wide=True, note="Δ is a change"),
)
ROWS = [
    {"name": ODD, "best": True, "mark": "best", "ratio": 0.20031, "change": 3.14159265, "low": -1.5, "high": 1 / 3},
    {"name": "=wanda > uniform", "best": False, "ratio": 0.2, "change": math.nan, "low": math.nan, "high": math.nan},
    {"name": "dense", "best": False, "mark": "dense"},
]
TABLE = Table("A title", COLUMNS, ROWS, ["a note *"], "table")


def page(*blocks) -> Page:
    view = View("one", "compare", "finished", ODD, [Section("First", blocks)], {"schema": 1})
    return Page(ODD, [], [view])


class Cells(HTMLParser):
    """The texts of the rows of a page's tables."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def test_a_table_has_the_same_rows_in_all_forms():
    shown = cells(TABLE)
    assert shown[0] == [f"{ODD} *", "20.0", "+3.1 (−1.5 to +0.3)"]
    assert shown[1][2] == "n/a"
    assert shown[2] == ["dense", "-", "-"]
    header, *rows = Cells(render_page(page(TABLE))).rows
    assert (header, rows) == (TABLE.header, shown)
    lines = [line for line in markdown_text([TABLE]).splitlines() if line.startswith("|")]
    parts = [[re.sub(r"\\(.)", r"\1", html.unescape(cell)).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in lines]  # fmt: skip
    assert [parts[0], *parts[2:]] == [TABLE.header, *shown]
    text = printed(TABLE, width=160)
    assert all(row[0] in text and row[1] in text for row in shown)
    assert ("+3.1" in text, "Δ" in text) == (False, False), "a wide column has no place on a terminal"
    narrow = printed(TABLE._replace(columns=[column._replace(wide=False) for column in COLUMNS]), width=160)
    assert ("+3.1" in narrow, narrow.count("Δ is a change")) == (True, 1), "control: one that has is explained"
    assert all(form.count("Δ is a change") == 1 for form in (render_page(page(TABLE)), markdown_text([TABLE])))


def test_csv_keeps_every_bit_and_is_no_formula():
    header, *lines = csv.reader(io.StringIO(table_csv(TABLE)))
    assert header == ["name", "best", "ratio", "change", "low", "high"]
    assert [float(cell or "nan") for cell in lines[0][2:]] == [0.20031, 3.14159265, -1.5, 1 / 3]
    assert lines[1] == ["'=wanda > uniform", "0", "0.2", "", "", ""]
    assert lines[2] == ["dense", "0", "", "", "", ""]


def test_every_block_is_shown_where_it_can_be():
    figure = Figure("plot", f"figure {ODD}", lambda drawing: drawing.subplots().plot([0, 1], label=ODD))
    blocks = [
        Words(f"words {ODD}"), TABLE, facts({"fact": ODD}), Code("command", f"saap {ODD} ```"), figure,
        Section(f"folded {ODD}", [Words("inside")], folded=True),
    ]  # fmt: skip
    shown = render_page(page(*blocks))
    for text in (f"words {ODD}", "fact", f"saap {ODD} ```", f"figure {ODD}", f"folded {ODD}", "inside"):
        assert str(html.escape(text, quote=False)) in shown.replace("&#34;", '"').replace("&quot;", '"'), text
    assert "<b>" not in shown
    assert shown.count("<svg") == shown.count("<figure") == 1
    assert "<details><summary>folded" in shown
    marked = markdown_report(page(*blocks))
    assert f"````\nsaap {ODD} ```\n````" in marked
    assert not re.search(r"<b>|(?<!\\)\[y", marked.replace(f"saap {ODD}", ""))
    assert "figure" not in marked
    text = printed(*blocks, width=160)
    assert f"words {ODD}" in text
    assert "inside" not in text


def test_the_page_asks_for_nothing_and_runs_nothing():
    shown = render_page(page(Words("x")))
    assert "<script" not in shown
    assert "default-src 'none'" in shown
    assert not re.search(r'(src|href)="(?!#)', shown)
    assert "prefers-color-scheme: dark" in shown


def test_a_matrix_is_tinted_by_its_numbers():
    columns = [Column("", ("name",), words=True), Column("1", ("1",), "{:.1f}".format)]
    table = Table("", columns, [{"name": "a", "1": -0.5}, {"name": "b", "1": np.nan}, {"name": "c"}], matrix=True)
    assert [table.tint(row, 1) for row in table.rows] == [-0.5, 0.0, 0.0]
    assert render_page(page(table)).count('--tint: 30%" class="below"') == 1


@pytest.mark.parametrize("title", ["equal", "bytes"])
def test_equal_figures_have_equal_bytes_whatever_the_users_settings(title):
    import matplotlib

    def figure() -> str:
        return inline(Figure("plot", title, lambda drawing: drawing.subplots().plot([0, 1], "o-", label="$a_1$")))

    before, first = dict(matplotlib.rcParams), figure()
    with matplotlib.rc_context({"svg.fonttype": "path", "lines.linewidth": 9.0}):
        assert figure() == first
    assert dict(matplotlib.rcParams) == before
    assert f"<title>{title}</title>" in first
    assert "stroke: #010203" in first, "for which the page has its own colour"
