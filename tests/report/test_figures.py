"""Figures: well-formed, deterministic, complete, and true to the numbers."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from saap_jax.report.figures import colour_of, frontier, kept_map, log_ticks, spread
from tests.report import conftest as fake

SVG = "{http://www.w3.org/2000/svg}"


def frontier_svg(lines=None, metric: int = 1) -> ElementTree.Element:
    return ElementTree.fromstring(frontier(fake.fields(), lines or fake.candidates(), fake.METRICS[metric]))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def heights(svg: ElementTree.Element, name: str) -> list[float]:
    """Return the y of an estimator's markers, by ratio."""
    found = []
    for path in svg.iter(f"{SVG}path"):
        title = path.find(f"{SVG}title")
        if title is not None and (title.text or "").startswith(f"{name}: "):
            found.append(float(re.findall(r"[\d.]+", path.attrib["transform"])[1]))
    return found


class TestFrontier:
    def test_names_every_estimator_once_and_the_dense_model(self):
        shown = texts(frontier_svg())
        for name in (*fake.ESTIMATORS, "dense"):
            assert sum(re.match(rf"{name}(?![a-z_])", text) is not None for text in shown) == 1

    def test_is_deterministic_in_whatever_order_candidates_come(self):
        lines = fake.candidates()
        drawn = frontier(fake.fields(), lines, fake.METRICS[0])
        assert drawn == frontier(fake.fields(), lines[::-1], fake.METRICS[0])
        assert drawn != frontier(fake.fields(), lines, fake.METRICS[1])

    def test_has_a_text_alternative(self):
        svg = frontier_svg()
        assert svg.attrib["role"] == "img"
        assert fake.METRICS[1] in svg.attrib["aria-label"]
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
        assert [text for text in texts(svg) if "↑" in text] == ["randominf ↑", "magnitude45529 ↑"]

    def test_colour_and_marker_are_never_both_shared(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i)) for i in range(30)]
        svg = frontier_svg(lines)
        styles = [(p.attrib["d"], p.attrib["fill"]) for p in svg.iter(f"{SVG}path")
                  if (p.findtext(f"{SVG}title") or "").startswith("e")]  # fmt: skip
        assert len(styles) == 60  # a point and a label each
        assert len(set(styles)) == 30

    def test_labels_do_not_overlap_and_stay_inside(self):
        lines = [fake.candidate(f"e{i:02}", 0.2, (1.0, 40.0 + i / 100)) for i in range(30)]
        svg = frontier_svg(lines)
        places = sorted(
            float(text.attrib["y"]) for text in svg.iter(f"{SVG}text") if "".join(text.itertext())[0] == "e"
        )
        assert min(b - a for a, b in itertools.pairwise(places)) > 13
        assert places[0] > 0
        assert places[-1] < float(svg.attrib["height"])

    @pytest.mark.parametrize("ppl", [math.inf, 1e300, 30.0])
    def test_a_single_candidate(self, ppl):
        assert len(heights(frontier_svg([fake.candidate("a", 0.2, (1.0, ppl))]), "a")) == 1

    def test_nothing_to_draw(self):
        assert frontier(fake.fields(), [fake.candidate("a", 0.2, (1.0, math.nan))], fake.METRICS[1]) == ""
        assert frontier({}, [], "x") == ""


class TestKeptMap:
    def test_a_cell_for_every_candidate_structure_and_layer(self):
        lines = fake.candidates()[:8]
        svg = ElementTree.fromstring(kept_map(fake.fields(), lines, "title"))
        cells = {rect.findtext(f"{SVG}title"): rect.attrib["fill"] for rect in svg.iter(f"{SVG}rect")}
        for line in lines:
            for structure, units in fake.UNITS.items():
                for layer, count in enumerate(line["kept"][structure]):
                    said = f"{line['estimator']}, {structure}, layer {layer}: keeps {count} of {units}"
                    assert cells[said] == colour_of(count / units)
        assert svg.attrib["aria-label"] == "title"

    def test_layers_without_units_have_no_cell(self):
        run = {"model": {"units": {"mlp": [4, 0, 2]}}}
        svg = ElementTree.fromstring(kept_map(run, [{"candidate": "a@0.5", "kept": {"mlp": [2, 0, 2]}}], "t"))
        said = [rect.findtext(f"{SVG}title") for rect in svg.iter(f"{SVG}rect")]
        assert [text for text in said if text and "layer" in text] == [
            "a, mlp, layer 0: keeps 2 of 4",
            "a, mlp, layer 2: keeps 2 of 2",
        ]

    def test_nothing_to_draw(self):
        assert kept_map(fake.fields(), [], "t") == ""
        assert kept_map({}, [{"candidate": "a"}], "t") == ""


def test_odd_names_stay_text():
    line = fake.candidate('<b> & "q"', 0.2, (1.0, 40.0))
    for drawn in (frontier(fake.fields(), [line], fake.METRICS[0]), kept_map(fake.fields(), [line], "<t>")):
        svg = ElementTree.fromstring(drawn)
        assert any('<b> & "q"' in text for text in texts(svg))
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


def test_the_scale_grows_lighter():
    def luminance(colour: str) -> float:
        red, green, blue = bytes.fromhex(colour[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [luminance(colour_of(share / 20)) for share in range(21)]
    assert values == sorted(values)
