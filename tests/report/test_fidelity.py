"""Fidelity: ranked, complete, as wide as a terminal, and true to the numbers."""

import csv
import io
import itertools
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import rankdata

from saap_jax.evaluation.rank_correlation import MEASURES, Fidelity, fidelity
from saap_jax.report.figures.draw import on_screen, painted
from saap_jax.report.kinds.fidelity import BRIEF, fidelity_blocks, fidelity_table, format_interval, ranking, scatter
from saap_jax.report.page.blocks import Data, Detail, leaves
from saap_jax.report.page.csv_text import data_text
from saap_jax.report.page.markdown import markdown_text
from tests.report.shown import printed, words

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


BLOCKS = fidelity_blocks(ROWS, SCORES, EXACT, Detail())
DATA = next(block for block in leaves(BLOCKS) if isinstance(block, Data))


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
        text = printed(fidelity_table(low, scope, BRIEF))
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text
        for name in SCORES:
            assert name in text
        assert text.count("−0.55 [−0.66, −0.44]") == len(SCORES) * (2 if scope == "pooled" else 3)

    def test_markdown_has_all_measures(self):
        text = markdown_text(BLOCKS)
        assert "| estimator | Spearman | Kendall | Spearman in layers | Kendall in layers |" in text
        assert all(f"## {scope} units: rank" in text for scope in ("attention, 36", "mlp, 120", "pooled, 156"))
        assert "\n| estimator | Spearman | Kendall |\n" in text
        assert "| best \\* | 1.00 [1.00, 1.00] |".replace("[", "\\[").replace("]", "\\]") in text
        assert text.count("| a&amp;b\\|&lt;c> ") == text.count("\n- \\* highest Spearman") == 3
        assert "gate_taylor ≈" not in text
        assert "| constant | n/a | n/a | n/a | n/a |" in text

    def test_csv_keeps_every_bit(self):
        header, *lines = csv.reader(io.StringIO(data_text(DATA)))
        assert header == list(Fidelity._fields)
        assert len(lines) == len(SCORES) * 3 * len(MEASURES)
        for line, row in zip(lines, ROWS, strict=True):
            assert line[:3] == list(row[:3])
            np.testing.assert_array_equal([float(cell or "nan") for cell in line[3:]], row[3:])

    def test_signs(self):
        row = Fidelity("e", "mlp", "kendall", 9, -0.001, -0.999, 0.049)
        assert format_interval(row) == "0.00 [−1.00, 0.05]"
        assert format_interval(row._replace(low=np.nan)) == "0.00"


def plot(scores=SCORES, exact=EXACT, rows=ROWS):
    found = scatter(rows, scores, exact)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def figure():
    return painted(plot())


def panels(figure) -> list[np.ndarray]:
    """Return the places of each panel's units, panel after panel; rank across, change up."""
    visible = [axis for axis in figure.axes if axis.get_visible() and axis.get_title(loc="left")]
    return [np.concatenate([patch.get_path().vertices[::2] for patch in axis.patches]) for axis in visible]


class TestScatter:
    def test_has_a_panel_an_estimator_and_a_dot_a_unit(self, figure):
        assert [len(panel) for panel in panels(figure)] == [36] * 7 + [120] * 7
        assert all(((panel > 0) & (panel < 1)).all() for panel in panels(figure))

    def test_dots_are_the_ranks_of_the_scores(self, figure):
        first = ranking(ROWS, "attention")[1][0]
        wanted = rankdata(SCORES[first]["attention"]) / 37
        np.testing.assert_allclose(sorted(panels(figure)[1][:, 0]), sorted(wanted))
        assert sorted(panels(figure)[6][:, 0]) != pytest.approx(sorted(wanted)), "constant scores share one rank"

    def test_best_first_and_rising(self, figure):
        best, *_, constant = panels(figure)[:7]
        by_rank = sorted(best.tolist())
        assert all(earlier[1] <= later[1] for earlier, later in itertools.pairwise(by_rank))
        assert len(set(constant[:, 0])) == 1

    def test_colour_is_depth(self, figure):
        axis = next(axis for axis in figure.axes if axis.get_title(loc="left"))
        assert len({patch.get_edgecolor() for patch in axis.patches}) == len(axis.patches) == 10

    def test_has_a_text_alternative(self):
        svg = ElementTree.fromstring(on_screen(plot()))
        assert svg.attrib["role"] == "img"
        said = svg.findtext(f"{SVG}desc") or ""
        assert "attention: best 1.00 [1.00, 1.00], gate_taylor 0." in said
        assert "constant n/a." in said
        assert LONG in said

    def test_long_names_show_both_ends(self, figure):
        shown = " ".join(words(figure))
        assert "taylor_eleme…uction='max')" in shown
        assert "a&b|<c>" in shown

    def test_the_axis_has_both_signs(self, figure):
        assert {"0", "+1", "−1", "+0.0001", "−0.0001"} <= set(words(figure))

    @pytest.mark.slow
    def test_only_gains_and_only_one_structure(self):
        exact = {"attention": np.abs(EXACT["attention"]), "mlp": np.full((12, 30), np.nan)}
        drawn = painted(plot(exact=exact, rows=fidelity(SCORES, exact, resamples=5)))
        assert [len(panel) for panel in panels(drawn)] == [36] * 7
        assert not any("mlp" in text for text in words(drawn))
        zero = {"attention": np.zeros((12, 3)), "mlp": exact["mlp"]}
        painted(plot(exact=zero, rows=fidelity(SCORES, zero, resamples=5)))

    def test_nothing_measured_draws_nothing(self):
        nothing = {name: np.full(values.shape, np.nan) for name, values in EXACT.items()}
        assert scatter(fidelity(SCORES, nothing, resamples=5), SCORES, nothing) is None

    @pytest.mark.slow
    def test_is_deterministic(self):
        drawn = on_screen(plot())
        assert drawn == on_screen(plot())
        assert drawn != on_screen(plot(exact={name: -values for name, values in EXACT.items()}))
