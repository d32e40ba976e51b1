"""The frontier: well-formed, deterministic, complete, and true to the numbers; and what all drawings share."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from saap_jax.report.figures.ratio import MARKERS, Curve, colour_of, curves, frontier, legend, log_ticks, spread
from saap_jax.report.rows import comparison_rows, leading
from tests.report import conftest as fake

SVG = "{http://www.w3.org/2000/svg}"


def drawn(lines=None, metric: int = 1, limit: int = 60) -> str:
    lines = lines or fake.candidates()
    found, missing = curves(fake.fields(), lines, fake.METRICS[metric])
    return frontier(found, leading(comparison_rows(fake.fields(), lines), limit), "title", missing)


def frontier_svg(lines=None, metric: int = 1, limit: int = 60) -> ElementTree.Element:
    return ElementTree.fromstring(drawn(lines, metric, limit))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def group(svg: ElementTree.Element, name: str) -> ElementTree.Element:
    """Return the line of a variant with its markers."""
    return next(g for g in svg.iter(f"{SVG}g") if (g.findtext(f"{SVG}title") or "").startswith(f"{name}: "))


def heights(svg: ElementTree.Element, name: str) -> list[float]:
    """Return the y of a variant's markers, by ratio."""
    marks = [g.attrib["transform"] for g in group(svg, name).iter(f"{SVG}g") if "transform" in g.attrib]
    return [float(re.findall(r"[\d.]+", mark)[1]) for mark in marks]


def numbers(svg: ElementTree.Element) -> list[tuple[str, float]]:
    """Return the numbers at the ends of the lines with their y."""
    found = [
        text for g in svg.iter(f"{SVG}g") if g.attrib.get("class", "").startswith("k") for text in g.iter(f"{SVG}text")
    ]
    return [("".join(text.itertext()), float(text.attrib["y"])) for text in found]


class TestFrontier:
    def test_numbers_every_variant_once_and_names_the_dense_model(self):
        svg = frontier_svg()
        assert sorted(int(text.rstrip("↑")) for text, _ in numbers(svg)) == list(range(1, 9))
        assert [text for text in texts(svg) if text.startswith("dense")] == ["dense 34.70"]
        for name in fake.ESTIMATORS:
            assert group(svg, name) is not None

    def test_the_first_is_the_best_at_the_highest_ratio(self):
        svg = frontier_svg()
        order = leading(comparison_rows(fake.fields(), fake.candidates()), 60)
        assert order[0] == "activation_frequency"
        ends = [heights(svg, name)[-1] for name in order if name not in ("random", "magnitude")]
        assert ends == sorted(ends, reverse=True)
        assert order[-1] == "random", "it has no number at the highest ratio"

    def test_is_deterministic_in_whatever_order_candidates_come(self):
        lines = fake.candidates()
        assert drawn(lines, 0) == drawn(lines[::-1], 0) != drawn(lines, 1)

    def test_has_a_text_alternative(self):
        svg = frontier_svg()
        assert (svg.attrib["role"], svg.attrib["aria-label"]) == ("img", "title")
        description = svg.findtext(f"{SVG}desc") or ""
        assert "gate_fisher: 0.0 % 34.70, 19.9 % 52.70, 50.2 % 201.50." in description
        assert "Without a value: random@0.5." in description

    def test_the_axis_is_logarithmic_and_lower_is_better(self):
        lines = [fake.candidate(name, 0.2, (1.0, ppl)) for name, ppl in (("a", 40.0), ("b", 80.0), ("c", 160.0))]
        (a,), (b,), (c,) = (heights(frontier_svg(lines), name) for name in "abc")
        assert a > b > c
        assert a - b == pytest.approx(b - c, abs=0.2)

    def test_values_off_the_scale_are_drawn_on_its_edge(self):
        svg = frontier_svg(metric=0)
        assert heights(svg, "magnitude") == [heights(svg, "random")[1]] * 2
        assert heights(svg, "taylor_vector")[1] > heights(svg, "magnitude")[1] + 50
        assert len([text for text, _ in numbers(svg) if "↑" in text]) == 2

    def test_colour_and_marker_are_never_both_shared(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i)) for i in range(30)]
        svg = frontier_svg(lines)
        styles = set()
        for line in lines:
            drawing = group(svg, line["estimator"])
            marks = {path.attrib["d"] for path in drawing.iter(f"{SVG}path")}
            assert len(marks) == 1
            styles.add((*marks, drawing.attrib["class"]))
        assert len(styles) == 30

    def test_the_numbers_do_not_overlap_and_stay_inside(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i / 100)) for i in range(20)]
        svg = frontier_svg(lines)
        places = sorted(y for _, y in numbers(svg))
        assert len(places) == 20
        assert min(b - a for a, b in itertools.pairwise(places)) > 12
        assert places[0] > 0
        assert places[-1] < 320

    def test_shows_the_leading_ones_only(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i)) for i in range(30)]
        svg = frontier_svg(lines, limit=5)
        assert len(numbers(svg)) == 5
        assert "e04" in (svg.findtext(f"{SVG}desc") or "")
        assert "e05" not in (svg.findtext(f"{SVG}desc") or "")

    def test_runs_with_dense_models_of_their_own(self):
        both = [Curve("a", [(0.0, 10.0), (0.2, 20.0)]), Curve("b", [(0.0, 12.0), (0.2, 20.0)])]
        svg = ElementTree.fromstring(frontier(both, ["a", "b"], "title"))
        assert not any(text.startswith("dense") for text in texts(svg))
        assert (len(heights(svg, "a")), len(heights(svg, "b"))) == (2, 2)

    @pytest.mark.parametrize("ppl", [math.inf, 1e300, 30.0])
    def test_a_single_candidate(self, ppl):
        assert len(heights(frontier_svg([fake.candidate("a", 0.2, (1.0, ppl))]), "a")) == 1

    def test_nothing_to_draw(self):
        assert drawn([fake.candidate("a", 0.2, (1.0, math.nan))]) == ""
        assert frontier(curves({}, [], "x")[0], [], "t") == ""


def test_the_legend_names_what_the_numbers_mean():
    page = legend(["a", "<b>"])
    assert re.findall(r"</svg> ([^<]*)</li>", page) == ["a", "&lt;b&gt;"]
    assert 'class="k1"' in page
    assert list(MARKERS.values())[1] in page


def test_odd_names_stay_text():
    svg = frontier_svg([fake.candidate('<b> & "q"', 0.2, (1.0, 40.0))])
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
