"""A score run: rank correlations by hand, maps of layers, fusions and what the page says of them."""

import re

import numpy as np
import pytest

from saap_jax.report.blocks import Figure, Table
from saap_jax.report.figures import painted
from saap_jax.report.pages.score import find_patterns, fusion_table, layer_ranks, rank_table, score_sections
from saap_jax.report.patterns import rank_agreement
from saap_jax.runs.directory import RunDirectory
from saap_jax.types import Scores
from tests.report.shown import cells, printed

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
        rows = [[row.get(str(n)) for n in (1, 2, 3)] for row in rank_table(THREE).rows]
        wanted = [[None, 1.0, 0.5], [-1.0, None, 0.5], [NAN, NAN, None]]
        np.testing.assert_allclose(np.array(rows, np.float64), np.array(wanted, np.float64))

    def test_says_it_in_a_terminal(self):
        text = printed(rank_table(THREE, "[red]web"))
        lines = [line.split() for line in text.splitlines() if re.match(r" *\d \S", line)]
        assert lines == [
            ["1", "a", "-", "1.00", "0.50"],
            ["2", "[red]b", "−1.00", "-", "0.50"],
            ["3", "flat", "n/a", "n/a", "-"],
        ]
        assert "scenario [red]web: attention units below the diagonal, " in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 100

    def test_without_a_scenario(self):
        assert str(rank_table(THREE).title).startswith("Spearman rank correlation of scores: attention")


def invented(scenarios: tuple[str, ...], estimators: tuple[str, ...] = ("random", "wanda", "activation_frequency")):
    dice = np.random.default_rng(0)
    return {
        f"{scenario}/{name}/{structure}": dice.uniform(0, 1, shape)
        for scenario in scenarios
        for name in estimators
        for structure, shape in {"attention": (4, 3), "mlp": (4, 9)}.items()
    }


def kept(path, arrays, **more) -> RunDirectory:
    """Write a score run."""
    run = RunDirectory.open(path, {"keep_statistics": "all", "calibration": {"examples": 4}})
    run.save_arrays("scores", arrays)
    run.update(kind="score", status="finished", scenarios={"web": [4, 128]}, **more)
    return run


class TestPage:
    def test_says_what_the_scores_say(self, tmp_path):
        run = kept(tmp_path / "scored", invented(("web", "code")))
        sections = {section.title: section for section in score_sections(run.path, run.record)}
        said = " ".join(block.text for block in sections["Summary"].blocks)
        assert "3 estimators scored all units (12 attention, 36 mlp) in 2 scenarios: web, code." in said
        assert len([block for block in sections["Do estimators agree?"].blocks if isinstance(block, Table)]) == 2
        figures = [block for block in sections["Where importance lies"].blocks if isinstance(block, Figure)]
        assert [figure.title for figure in figures] == ["Mean rank by layer, web", "Mean rank by layer, code"]
        shown = painted(figures[0]).axes[0].collections[0].get_array()
        assert shown.shape == (3, 4)
        np.testing.assert_allclose(shown[1], 100 * layer_ranks(invented(("web",))["web/wanda/attention"]))
        assert "Patterns by scenario" in sections

    def test_one_scenario_and_one_estimator_leave_out_what_takes_more(self, tmp_path):
        run = kept(tmp_path / "scored", invented(("web",), ("wanda",)))
        titles = [section.title for section in score_sections(run.path, run.record)]
        assert titles == ["Summary", "Where importance lies", "To reproduce"]
        assert find_patterns({}) is None

    def test_nothing_yet(self, tmp_path):
        run = RunDirectory.open(tmp_path / "begun", {"keep_statistics": "all"})
        first, *_ = score_sections(run.path, run.record)
        assert first.blocks[0].text == "Nothing is scored yet."

    def test_damaged_scores_are_refused(self, tmp_path):
        run = kept(tmp_path / "scored", {"wanda": np.ones((2, 2))})
        with pytest.raises(ValueError, match="named scenario/estimator/structure, got 'wanda'"):
            score_sections(run.path, run.record)


def test_layers_of_a_structure_are_one_row_of_a_fusion():
    sigmas = {"a": {"mlp/0": 1.0, "mlp/1": 2.0}, "b": {"mlp/0": 0.5, "mlp/1": 0.5}}
    weights = {name: {scope: 1 / (2 * sigma**2) for scope, sigma in each.items()} for name, each in sigmas.items()}
    table = fusion_table({"web": {"a+b": {"sigmas": sigmas, "weights": weights}}})
    assert cells(table) == [
        ["web", "a+b", "a", "mlp, 2 layers", "1 to 2", "0.125 to 0.5"],
        ["web", "a+b", "b", "mlp, 2 layers", "0.5", "2"],
    ]
