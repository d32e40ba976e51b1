"""Scores side by side: rank correlations, what all plots share, and that no drawing depends on the user's settings."""

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from saap_jax.report.figures.draw import on_screen
from saap_jax.report.kinds.scores import rank_agreement, rank_cells, rank_table
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import format_correlation, short_name
from saap_jax.types import Scores
from tests.report.shown import printed

SVG = "{http://www.w3.org/2000/svg}"
NAN, INF = np.nan, np.inf


def units(*attention: float, mlp: tuple[float, ...] = (1.0, 2.0)) -> Scores:
    """Return the scores of a model of one layer."""
    return {"attention": np.array([attention]), "mlp": np.array([mlp])}


class TestRankAgreement:
    def test_by_hand(self):
        scores = {"a": units(1.0, 2.0, 3.0), "b": units(20.0, 10.0, 30.0), "c": units(3.0, 2.0, 1.0)}
        # Σ d² is 2, 8 and 6; ρ is 1 - 6 Σ d² / 24
        np.testing.assert_allclose(rank_agreement(scores, "attention"), [[1, 0.5, -1], [0.5, 1, -0.5], [-1, -0.5, 1]])

    def test_equal_scores_share_their_rank(self):
        scores = {"a": units(1.0, 2.0, 3.0, 4.0), "b": units(1.0, 5.0, 5.0, 9.0)}
        assert rank_agreement(scores, "attention")[0, 1] == pytest.approx(4.5 / np.sqrt(5 * 4.5))

    def test_only_units_that_all_score_with_a_finite_number(self):
        scores = {"a": units(1.0, 2.0, 3.0, NAN, 9.0), "b": units(1.0, 2.0, 3.0, NAN, INF)}
        assert rank_agreement(scores, "attention")[0, 1] == pytest.approx(1.0)
        further = {**scores, "c": units(1.0, NAN, 0.0, NAN, 5.0)}
        assert rank_agreement(further, "attention")[0, 2] == pytest.approx(-1.0)  # first and third unit are left

    @pytest.mark.parametrize("other", [(5.0, 5.0, 5.0), (NAN, 1.0, NAN), (NAN, NAN, NAN), ()], ids=str)
    def test_no_correlation_is_nan(self, other):
        matrix = rank_agreement({"a": units(*(1.0, 2.0, 3.0)[: len(other)]), "b": units(*other)}, "attention")
        np.testing.assert_array_equal(matrix, [[1, NAN], [NAN, 1]])

    def test_does_not_change_with_the_unit_of_measure(self):
        random = np.random.default_rng(0)
        scores = {"a": {"mlp": random.random((4, 9))}, "b": {"mlp": random.random((4, 9))}}
        changed = {"a": {"mlp": 1e-12 * scores["a"]["mlp"] ** 3}, "b": scores["b"]}
        np.testing.assert_array_equal(rank_agreement(scores, "mlp"), rank_agreement(changed, "mlp"))
        opposite = {"a": {"mlp": -scores["a"]["mlp"]}, "b": scores["b"]}
        assert rank_agreement(opposite, "mlp")[0, 1] == pytest.approx(-rank_agreement(scores, "mlp")[0, 1])
        assert rank_agreement(scores, "mlp")[0, 1] != 0

    def test_nothing_to_compare(self):
        assert rank_agreement({}, "mlp").shape == (0, 0)
        assert rank_agreement({"a": units(1.0)}, "mlp").tolist() == [[1.0]]


THREE = {
    "a": units(1.0, 2.0, 3.0, mlp=(1.0, 2.0, 3.0)),
    "[red]b": units(3.0, 2.0, 1.0, mlp=(1.0, 2.0, 3.0)),
    "flat": units(1.0, 1.0, 1.0, mlp=(1.0, 3.0, 2.0)),
}


class TestRankTable:
    def test_attention_is_below_and_mlp_above_the_diagonal(self):
        np.testing.assert_allclose(rank_cells(THREE), [[NAN, 1, 0.5], [-1, NAN, 0.5], [NAN, NAN, NAN]])

    def test_says_it_in_a_terminal(self):
        text = printed(rank_table(THREE, "[red]web"))
        lines = [line.split() for line in text.splitlines() if re.match(r" *\d \S", line)]
        assert lines == [
            ["1", "a", "·", "1.00", "0.50"],
            ["2", "[red]b", "−1.00", "·", "0.50"],
            ["3", "flat", "n/a", "n/a", "·"],
        ]
        assert "scenario [red]web: attention units below the diagonal, " in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 100

    def test_without_a_scenario(self):
        assert str(rank_table(THREE).title).startswith("Spearman rank correlation of scores: attention")


def test_short_names_keep_both_ends():
    assert short_name("a" * 26) == "a" * 26
    assert short_name("a" * 20 + "b" * 20) == "a" * 12 + "…" + "b" * 13
    assert format_correlation(-0.005) == "−0.01"


class TestOnScreen:
    @staticmethod
    def draw(height: float = 2.0, title: str = "t", label: str = "x") -> str:
        def paint(figure):
            axis = figure.subplots()
            axis.plot([0, 1], [0, 1])
            axis.set_xlabel(label)

        return on_screen(Plot("p", title, '<d> & "q"', paint, height))

    def test_takes_colour_font_and_size_of_the_page(self):
        text = self.draw()
        svg = ElementTree.fromstring(text)
        assert (svg.attrib["width"], svg.attrib["height"], svg.attrib["viewBox"]) == ("1000", "200", "0 0 720 144")
        assert "#010203" not in text
        assert "currentColor" in text
        assert "DejaVu" not in text
        assert "<style" not in text
        assert "<metadata" not in text

    def test_says_what_it_shows(self):
        svg = ElementTree.fromstring(self.draw(title="<t> & 'q'"))
        assert svg.findtext(f"{SVG}title") == svg.attrib["aria-label"] == "<t> & 'q'"
        assert svg.findtext(f"{SVG}desc") == '<d> & "q"'

    def test_equal_drawings_of_another_title_share_no_identifier(self):
        def ids(text: str) -> set[str]:
            return set(re.findall(r' id="([^"]*)"', text))

        first = ids(self.draw())
        assert ids(self.draw()) == first
        assert not first & ids(self.draw(title="u"))
        assert not first & ids(self.draw(label="y"))
        assert first
        assert all(re.fullmatch(r"[a-z][\w-]*", name) for name in first)

    def test_leaves_the_users_settings_alone(self):
        before = dict(matplotlib.rcParams)
        first = self.draw()
        with matplotlib.rc_context({"svg.fonttype": "path", "lines.linewidth": 9.0}):
            assert self.draw() == first
        assert dict(matplotlib.rcParams) == before

    def test_letters_that_the_font_lacks_are_left_to_the_page(self, recwarn):
        assert "日本" in self.draw(label="日本")
        assert list(recwarn) == []
