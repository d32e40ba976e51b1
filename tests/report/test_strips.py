"""Charts of one line a name: cells that are true to the numbers, names that stay text, axes with round ticks."""

import math
import re

import pytest

from saap_jax.report.kinds.compare import kept_map, kept_shares
from saap_jax.report.page.blocks import Axis, Band, Chart, Column, Heat, Interval, Note, Strip
from saap_jax.report.page.strips import LEVELS, chart_html, layer_axis, nice_axis
from tests.report import conftest as fake
from tests.report.test_html import Page

AXIS = Axis(-10.0, 30.0, [(0.0, "0"), (20.0, "+20")])


def drawn(cell, axis: Axis | None = AXIS) -> str:
    """Return the drawing of a cell."""
    html = chart_html(Chart("c", "chart", "name", [Column("x", axis)], [Strip("a", [cell])]))
    return html.partition("</th><td")[2].partition(">")[2].partition("</td>")[0]


def heat(shares, said: str) -> str:
    return drawn(Heat(shares, said))


def interval(*numbers, said: str = "x", sure: bool = True) -> str:
    return drawn(Interval(*numbers, said=said, sure=sure))


def cells_of(svg: str) -> dict[int, int]:
    """Return the level of every cell of heat that is drawn; none is drawn twice."""
    found: dict[int, int] = {}
    for level, path in re.findall(r'<path class="h(\d+)" d="([^"]*)"/>', svg):
        for start, length in re.findall(r"M(\d+) 0h(\d+)", path):
            for cell in range(int(start), int(start) + int(length)):
                assert cell not in found
                found[cell] = int(level)
    return found


class TestHeat:
    def test_a_cell_a_share(self):
        svg = heat([0.0, 0.5, 0.5, 1.0, 0.52, 0.5], "said")
        assert cells_of(svg) == {0: 0, 1: 10, 2: 10, 3: LEVELS, 4: 10, 5: 10}
        assert 'viewBox="0 -.5 6 1"' in svg

    def test_what_does_not_exist_is_blank(self):
        assert cells_of(heat([math.nan, 1.0, math.nan], "x")) == {1: LEVELS}

    def test_shares_are_cut_at_the_ends(self):
        assert cells_of(heat([-0.3, 1.7], "x")) == {0: 0, 1: LEVELS}

    def test_says_itself_in_words(self):
        assert "<title>a &lt;b&gt;</title>" in heat([0.5], "a <b>")


class TestInterval:
    def test_lies_where_the_axis_says(self):
        svg = interval(10.0, 0.0, 20.0)
        assert 'cx="50%"' in svg
        assert 'x="25%" y="10" width="50%"' in svg
        assert 'class="point"' in svg
        assert 'class="open"' in interval(10.0, 0.0, 20.0, sure=False)

    def test_beyond_the_axis_is_an_arrow(self):
        assert ["circle" in interval(value, math.nan, math.nan) for value in (30.0, 31.0, -11.0)] == [
            True, False, False,
        ]  # fmt: skip
        assert "→" in interval(31.0, math.nan, math.nan)
        assert "←" in interval(-11.0, math.nan, math.nan)

    def test_without_an_interval(self):
        assert "whisker" not in interval(1.0, math.nan, math.nan)
        assert "circle" not in interval(math.nan, math.nan, math.nan)


def test_a_band_lies_where_the_axis_says():
    svg = drawn(Band([-10.0, 0.0, 10.0, 20.0, 30.0], "x"))
    assert re.findall(r'class="(\w+)" x="([^"]*)"(?: y="[^"]*")? width="([^"]*)"', svg) == [
        ("whisker", "0%", "100%"), ("box", "25%", "50%"), ("middle", "50%", "2"),
    ]  # fmt: skip


def chart(first: str, columns: list[Column], strips: list[Strip]) -> str:
    return chart_html(Chart("c", "chart", first, columns, strips))


class TestChart:
    def test_a_line_a_name_and_a_cell_a_column(self):
        cells = [Interval(1.0, 0.0, 2.0, "x"), Note("1")]
        html = chart("who", [Column("left", AXIS), Column("right")], [Strip("a,b", cells, "best")] * 3)
        page = Page(html)
        assert [attrs.get("class") for attrs in page.of("td")] == ["strip g0", None] * 3
        assert [attrs.get("class") for attrs in page.of("tr")] == [None, "best", "best", "best"]
        assert page.of("table")[0]["class"] == "chart numbered"
        assert "a,<wbr>b" in html

    def test_names_stay_text(self):
        html = chart("<i>", [Column("<b>", AXIS), Column("")], [Strip("<script>", [Note("<u>", "<s>"), Note("")])])
        assert not re.search("<i>|<b>|<script>|<u>|<s>", html)
        assert "&lt;u&gt; <small>&lt;s&gt;</small>" in html

    def test_ticks_stand_where_the_axis_says(self):
        spans = Page(chart("who", [Column("left", AXIS)], [Strip("a", [Note("")])])).of("span")
        assert [attrs["style"] for attrs in spans] == ["left:25%", "left:75%"]

    def test_nothing_to_show(self):
        assert chart("who", [Column("left", AXIS)], []) == ""

    def test_a_drawing_needs_an_axis(self):
        with pytest.raises(ValueError, match="expected an axis for a drawing, got none: said"):
            chart("who", [Column("left")], [Strip("a", [Interval(1.0, 0.0, 2.0, "said")])])


@pytest.mark.parametrize(("low", "high"), [(-0.2, 11.0), (-80.0, 1500.0), (0.0, 1e-9), (-3.0, 0.0), (0.0, 0.043)])
def test_ticks_are_few_round_and_inside(low, high):
    axis = nice_axis(low, high)
    assert 1 <= len(axis.ticks) <= 6
    assert all(low - 1e-9 <= at <= high + 1e-9 for at, _ in axis.ticks)
    assert (0.0, "0") in axis.ticks


@pytest.mark.parametrize("layers", [1, 2, 8, 30, 32, 80, 126])
def test_layers_are_numbered_from_the_first_to_the_last(layers):
    ticks = [int(text) for _, text in layer_axis(layers).ticks]
    assert (ticks[0], ticks[-1]) == (0, layers - 1)
    assert len(ticks) <= 6


def kept(run: dict, lines: list[dict]) -> str:
    found = kept_map(run, lines)
    assert found is not None
    return chart_html(found)


class TestKeptMap:
    def test_a_cell_for_every_candidate_structure_and_layer(self):
        lines = fake.candidates()[:8]
        rows = kept(fake.fields(), lines).split("<tr>")[2:]
        assert len(rows) == 8
        for line, row in zip(lines, rows, strict=True):
            drawings = re.findall("<svg.*?</svg>", row)
            for (structure, units), drawing in zip(fake.UNITS.items(), drawings, strict=True):
                counts = line["kept"][structure]
                wanted = {layer: round(LEVELS * count / units) for layer, count in enumerate(counts)}
                assert cells_of(drawing) == wanted
                assert f"{line['estimator']}, {structure}: of {units} each layer keeps {counts[0]} " in drawing

    def test_means_over_seeds(self):
        shares = kept_shares({"model": {"units": {"mlp": 4}}}, {"mlp": [2.5, 4]})
        assert shares == {"mlp": [0.625, 1.0]}

    def test_nothing_to_draw(self):
        assert kept_map(fake.fields(), []) is None
        assert kept_map({}, [{"candidate": "a"}]) is None
