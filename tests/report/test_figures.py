"""Perplexity against ratio: deterministic, complete, and true to the numbers; and what figures share."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from saap_jax.evaluation.scales import LOSS
from saap_jax.report.figures.axes import log_ticks, spread
from saap_jax.report.figures.draw import marker_path, on_screen, painted
from saap_jax.report.figures.palette import MARKERS
from saap_jax.report.figures.ratio import Curve, curves, ratio_panels, ratio_plot
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.html import colour_of, legend_html
from saap_jax.runs.standing import comparison_rows, leading
from tests.report import conftest as fake
from tests.report.shown import words

SVG = "{http://www.w3.org/2000/svg}"


def order_of(lines: list[dict], limit: int = 60) -> list[str]:
    return leading(comparison_rows(fake.fields(), lines), limit)


def plot(lines: list[dict] | None = None, metric: int = 1, limit: int = 60) -> Plot:
    lines = lines or fake.candidates()
    found, missing = curves(fake.fields(), lines, fake.METRICS[metric])
    drawn = ratio_plot("title", found, order_of(lines, limit), missing)
    assert drawn is not None
    return drawn


def drawn_lines(figure) -> list[list[tuple[float, float]]]:
    """Return the points of every line of variants, the first of the order last; markers alone and levels are none."""
    lines = [
        line for line in figure.axes[0].get_lines() if line.get_marker() in MARKERS and line.get_linestyle() != "None"
    ]
    return [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]


def by_name(figure, order: list[str]) -> dict[str, list[tuple[float, float]]]:
    return dict(zip(order[::-1], drawn_lines(figure), strict=True))


def numbers(figure) -> list[str]:
    return [text for text in words(figure) if re.fullmatch(r"\d+↑?( [a-z].*)?", text)]


def test_losses_of_0_and_below_have_no_place_on_a_logarithmic_axis():
    metric, dense = "loss held_out", -0.5
    rows = [
        {"candidate": f"wanda@{ratio}", "variant": "wanda", "ratio_asked": ratio, "ratio_actual": ratio,
         "ppl": {metric: ppl}} for ratio, ppl in ((0.1, 0.0), (0.2, 0.3))
    ]  # fmt: skip
    found, missing = curves({"dense": {"ppl": {metric: dense}}}, rows, metric)
    assert (found, missing) == ([Curve("wanda", [(0.2, 0.3)])], ["wanda@0.1"])
    assert curves({"dense": {"ppl": {metric: 0.1}}}, rows, metric)[0][0].points[0] == (0.0, 0.1), "negative control"
    drawn = ratio_plot("title", found, ["wanda"], missing, LOSS)
    assert drawn is not None
    assert painted(drawn)


class TestRatio:
    def test_shows_the_numbers_of_the_records(self):
        figure, order = painted(plot()), order_of(fake.candidates())
        dense, lines = fake.fields()["dense"]["ppl"][fake.METRICS[1]], fake.candidates()
        for name in ("gate_fisher", "wanda"):
            points = [(line["ratio_actual"], line["ppl"][fake.METRICS[1]]) for line in lines if line["variant"] == name]
            assert by_name(figure, order)[name] == [(0.0, dense), *points]
        assert by_name(figure, order)["wanda"] != by_name(figure, order)["gate_fisher"]

    def test_numbers_every_variant_once_and_names_the_dense_model(self):
        figure = painted(plot())
        labels = {tick.get_text() for axis in figure.axes for tick in axis.get_yticklabels()}
        ends = [number for number in numbers(figure) if number not in labels]
        assert sorted(int(text.split()[0].rstrip("↑")) for text in ends) == list(range(1, 9))
        assert [text for text in words(figure) if text.startswith("dense")] == ["dense 34.70"]

    def test_the_first_is_the_best_at_the_highest_ratio(self):
        order = order_of(fake.candidates())
        assert order[0] == "activation_frequency"
        found = by_name(painted(plot()), order)
        ends = [found[name][-1][1] for name in order if name not in ("random", "magnitude")]
        assert ends == sorted(ends)
        assert order[-1] == "random", "it has no number at the highest ratio"

    def test_is_deterministic_in_whatever_order_candidates_come(self):
        lines = fake.candidates()
        assert on_screen(plot(lines, 0)) == on_screen(plot(lines[::-1], 0)) != on_screen(plot(lines, 1))

    def test_has_a_text_alternative(self):
        svg = ElementTree.fromstring(on_screen(plot()))
        assert (svg.attrib["role"], svg.attrib["aria-label"]) == ("img", "title")
        description = svg.findtext(f"{SVG}desc") or ""
        ratios = [100 * line["ratio_actual"] for line in fake.candidates() if line["variant"] == "gate_fisher"]
        assert f"gate_fisher: 0.0 % 34.70, {ratios[0]:.1f} % 52.70, {ratios[1]:.1f} % 201.50." in description
        assert "Without a value above 0: random@0.5." in description

    def test_the_axis_is_logarithmic(self):
        assert painted(plot()).axes[0].get_yscale() == "log"

    def test_values_off_the_scale_are_drawn_on_its_edge(self):
        figure, order = painted(plot(metric=0)), order_of(fake.candidates())
        top, found = figure.axes[0].get_ylim()[1], by_name(figure, order)
        assert [ppl for _, ppl in found["magnitude"][1:]] == [top] * 2 == [found["random"][-1][1]] * 2
        assert found["taylor_vector"][-1][1] < top
        assert len([text for text in words(figure) if "↑" in text]) == 2

    def test_no_two_of_many_lines_look_alike(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i)) for i in range(30)]
        drawn = [line for line in painted(plot(lines)).axes[0].get_lines() if line.get_marker() in MARKERS][:30]
        assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn}) == 30

    def test_the_numbers_do_not_overlap_and_stay_inside(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i / 100)) for i in range(20)]
        figure = painted(plot(lines))
        ends = [text for text in figure.axes[0].texts if re.fullmatch(r"\d+( e\d+)?", text.get_text())]
        boxes = [Text.get_window_extent(text) for text in ends]  # without the line that leads there
        assert len(boxes) == 20
        for one, other in itertools.combinations(boxes, 2):
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 0 or high <= 0.3 * one.height
        assert all(0 < box.y0 < box.y1 < figure.bbox.y1 for box in boxes)

    def test_shows_the_leading_ones_only(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i)) for i in range(30)]
        assert len(drawn_lines(painted(plot(lines, limit=5)))) == 5
        assert "e04" in plot(lines, limit=5).description
        assert "e05" not in plot(lines, limit=5).description

    def test_runs_with_dense_models_of_their_own(self):
        both = [Curve("a", [(0.0, 10.0), (0.2, 20.0)]), Curve("b", [(0.0, 12.0), (0.2, 20.0)])]
        drawn = ratio_plot("title", both, ["a", "b"])
        assert drawn is not None
        figure = painted(drawn)
        assert not any(text.startswith("dense") for text in words(figure))
        lines = [line for line in figure.axes[0].get_lines() if line.get_marker() in MARKERS]
        assert [line.get_markevery() for line in lines] == [None, None], "each start is marked"

    @pytest.mark.parametrize("ppl", [math.inf, 1e300, 30.0])
    def test_a_single_candidate(self, ppl):
        assert len(drawn_lines(painted(plot([fake.candidate("a", 0.2, (1.0, ppl))])))) == 1

    def test_nothing_to_draw(self):
        lines = [fake.candidate("a", 0.2, (1.0, math.nan))]
        assert ratio_plot("t", curves(fake.fields(), lines, fake.METRICS[1])[0], order_of(lines)) is None
        assert ratio_plot("t", curves({}, [], "x")[0], []) is None
        assert ratio_panels("frontier", [], []) == []

    def test_paper_has_the_same_lines_and_their_names(self):
        lines = fake.candidates()
        found, order = curves(fake.fields(), lines, fake.METRICS[1])[0], order_of(lines)
        (panels,) = ratio_panels("frontier", [("text", found)], order)
        figure = painted(panels)
        assert by_name(figure, order) == by_name(painted(plot()), order)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == order


def test_the_legend_names_what_the_numbers_mean():
    page = legend_html(["a", "<b>"])
    assert re.findall(r"</svg> ([^<]*)</li>", page) == ["a", "&lt;b&gt;"]
    assert 'class="k1"' in page
    assert f'd="{marker_path(MARKERS[1])}"' in page
    assert len({marker_path(marker) for marker in MARKERS}) == len(MARKERS)


def test_a_marker_is_its_path():
    assert marker_path("s", 10.0) == "M-5 5L5 5L5 -5L-5 -5Z"


def test_odd_names_stay_text():
    svg = ElementTree.fromstring(on_screen(plot([fake.candidate('<b> & "q"', 0.2, (1.0, 40.0))])))
    assert '<b> & "q": ' in (svg.findtext(f"{SVG}desc") or "")
    assert svg.find(f".//{SVG}b") is None


@pytest.mark.parametrize(("low", "high"), [(20.0, 22.0), (100.0, 101.0), (1.0, 1e300), (0.5, 3.0), (33.0, 900.0)])
def test_ticks_are_few_ascending_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0]
    assert ticks[-1] <= high


def test_spread_keeps_the_order_the_gap_and_the_range():
    places = spread([5.0, 95.0, 96.0, 97.0], gap=10.0, low=0.0, high=100.0)
    assert places == [5.0, 80.0, 90.0, 100.0]
    assert spread([50.0, 51.0, 52.0], gap=10.0, low=0.0, high=100.0) == [41.0, 51.0, 61.0], "around where they belong"
    assert spread([1.0, 1.0], gap=10.0, low=0.0, high=100.0) == [0.0, 10.0]
    assert spread([], gap=1.0, low=0.0, high=1.0) == []


def test_the_scale_grows_lighter():
    def luminance(colour: str) -> float:
        red, green, blue = bytes.fromhex(colour[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [luminance(colour_of(share / 20)) for share in range(21)]
    assert values == sorted(values)


def test_the_last_digit_of_a_layout_is_not_seen():
    def drawn(shift: float) -> str:
        def paint(figure) -> None:
            axes = figure.subplots()
            axes.set_position((0.1 + shift, 0.1, 0.6, 0.8))
            axes.plot([0, 1], [0, 1])

        return on_screen(Plot("a", "A line", "One line.", paint, 2.0))

    assert drawn(0.0) == drawn(3e-17), "one unit in the last place"
    assert 0.1 + 3e-17 != 0.1
    assert drawn(0.0) != drawn(0.05), "negative control"
