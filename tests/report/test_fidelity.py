"""Fidelity on paper: ranked, complete, as wide as a terminal, and true to the numbers."""

import csv
import io
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from saap_jax.evaluation.fidelity import MEASURES, Fidelity, fidelity
from saap_jax.report.kinds.fidelity import (
    csv_fidelity,
    fidelity_scatter,
    format_interval,
    markdown_fidelity,
    ranking,
    rich_fidelity_table,
)

SVG = "{http://www.w3.org/2000/svg}"
LONG = "taylor_element(reduction='max')"


def invented() -> tuple[dict, dict, list[Fidelity]]:
    """Return scores of seven estimators, exact changes of 12 layers and the correlations."""
    random = np.random.default_rng(0)
    exact = {"attention": random.standard_normal((12, 3)), "mlp": 1e-4 * random.standard_t(2, (12, 30))}
    exact["mlp"][:, 10:] = np.nan
    scale = {"attention": 1.0, "mlp": 1e-4}
    noise = {"random": 50.0, "wanda": 2.0, LONG: 1.0, "a&b|<c>": 0.5, "gate_taylor": 0.2, "best": 0.0}
    scores = {
        name: {s: np.nan_to_num(e) + of * scale[s] * random.standard_normal(e.shape) for s, e in exact.items()}
        for name, of in noise.items()
    }
    scores["constant"] = {s: np.ones(e.shape) for s, e in exact.items()}
    return scores, exact, fidelity(scores, exact, resamples=50)


SCORES, EXACT, ROWS = invented()


def rendered(table) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


class TestTables:
    def test_ranking_is_best_first_and_nan_last(self):
        for scope in ("attention", "mlp"):
            values = [found["spearman"].value for _, found in ranking(ROWS, scope)]
            assert values[0] == 1.0
            assert np.isnan(values[-1])
            assert values[:-1] == sorted(values[:-1], reverse=True)
        assert [name for name, _ in ranking(ROWS, "mlp")][-2] == "random"

    @pytest.mark.parametrize("scope", ["attention", "mlp", "pooled"])
    def test_fits_a_terminal_of_100_columns(self, scope):
        low = [row._replace(value=-0.55, low=-0.66, high=-0.44) for row in ROWS]
        text = rendered(rich_fidelity_table(low, scope))
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text
        for name in SCORES:
            assert name in text
        assert text.count("−0.55 [−0.66, −0.44]") == len(SCORES) * (2 if scope == "pooled" else 3)

    def test_numbers_stand_below_each_other(self):
        lines = rendered(rich_fidelity_table(ROWS, "attention")).splitlines()
        assert len({line.index("[") for line in lines if "[" in line}) == 1

    def test_markdown_has_all_measures(self):
        text = markdown_fidelity(ROWS)
        assert (
            "attention, 36 units\n\n| estimator | Spearman | Kendall | Spearman in layers | Kendall in layers |" in text
        )
        assert "mlp, 120 units" in text
        assert "pooled, 156 units\n\n| estimator | Spearman | Kendall |\n" in text
        assert "| best \\* | 1.00 [1.00, 1.00] |" in text
        assert text.count("| a&b\\|<c> ") == text.count("\n\\* highest Spearman") == 3
        assert "gate_taylor ≈" not in text
        assert "| constant | n/a | n/a | n/a | n/a |" in text

    def test_csv_keeps_every_bit(self):
        header, *lines = csv.reader(io.StringIO(csv_fidelity(ROWS)))
        assert header == list(Fidelity._fields)
        assert len(lines) == len(SCORES) * 3 * len(MEASURES)
        for line, row in zip(lines, ROWS, strict=True):
            assert line[:3] == list(row[:3])
            np.testing.assert_array_equal([float(cell or "nan") for cell in line[3:]], row[3:])

    def test_signs(self):
        row = Fidelity("e", "mlp", "kendall", 9, -0.001, -0.999, 0.049)
        assert format_interval(row) == "0.00 [−1.00, 0.05]"
        assert format_interval(row, width=5) == " 0.00 [−1.00,  0.05]"
        assert format_interval(row._replace(low=np.nan)) == "0.00"


def drawing() -> ElementTree.Element:
    return ElementTree.fromstring(fidelity_scatter(SCORES, EXACT, ROWS))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def dots(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Return the places of each panel's units, panel after panel."""
    panels: list[list[tuple[float, float]]] = []
    for path in svg.iter(f"{SVG}path"):
        if path.find(f"{SVG}title") is not None:
            panels.append([])
        elif path.attrib.get("stroke-linecap") == "round":
            panels[-1] += [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", path.attrib["d"])]
    return panels


class TestScatter:
    def test_has_a_panel_an_estimator_and_a_dot_a_unit(self):
        panels = dots(drawing())
        assert [len(panel) for panel in panels] == [36] * 7 + [120] * 7
        for panel in panels:
            assert max(x for x, _ in panel) - min(x for x, _ in panel) <= 172
            assert max(y for _, y in panel) - min(y for _, y in panel) <= 132

    def test_best_first_and_rising(self):
        best, *_, constant = dots(drawing())[:7]
        by_rank = sorted(best)
        assert all(later[1] <= earlier[1] for earlier, later in itertools.pairwise(by_rank))
        assert len({x for x, _ in constant}) == 1

    def test_dots_stay_in_the_drawing(self):
        svg = drawing()
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for x, y in itertools.chain(*dots(svg)):
            assert 0 < x < width
            assert 0 < y < height

    def test_has_a_text_alternative(self):
        svg = drawing()
        assert svg.attrib["role"] == "img"
        said = svg.findtext(f"{SVG}desc") or ""
        assert "attention: best 1.00 [1.00, 1.00], gate_taylor 0." in said
        assert "constant n/a." in said
        assert LONG in said

    def test_long_names_show_both_ends(self):
        shown = texts(drawing())
        assert "taylor_eleme…uction='max')" in shown
        assert [path.text for path in drawing().iter(f"{SVG}title")].count(LONG) == 2
        assert "a&b|<c>" in shown

    def test_the_axis_has_both_signs(self):
        shown = texts(drawing())
        assert {"0", "+1", "−1", "+0.0001", "−0.0001"} <= set(shown)

    def test_only_gains_and_only_one_structure(self):
        exact = {"attention": np.abs(EXACT["attention"]), "mlp": np.full((12, 30), np.nan)}
        drawn = fidelity_scatter(SCORES, exact, fidelity(SCORES, exact, resamples=5))
        assert [len(panel) for panel in dots(ElementTree.fromstring(drawn))] == [36] * 7
        assert "mlp" not in drawn
        zero = {"attention": np.zeros((12, 3)), "mlp": exact["mlp"]}
        ElementTree.fromstring(fidelity_scatter(SCORES, zero, fidelity(SCORES, zero, resamples=5)))

    def test_nothing_measured_draws_nothing(self):
        nothing = {name: np.full(values.shape, np.nan) for name, values in EXACT.items()}
        assert fidelity_scatter(SCORES, nothing, fidelity(SCORES, nothing, resamples=5)) == ""

    def test_is_deterministic(self):
        drawn = fidelity_scatter(SCORES, EXACT, ROWS)
        assert drawn == fidelity_scatter(SCORES, EXACT, ROWS)
        assert drawn != fidelity_scatter(SCORES, {name: -values for name, values in EXACT.items()}, ROWS)
