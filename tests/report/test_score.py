"""A score run: rank correlations and patterns by hand, maps of layers, fusions and what the page says of them."""

import re

import numpy as np
import pytest
from scipy.stats import spearmanr

from saap_jax.report.blocks import Figure, Table
from saap_jax.report.figures import painted
from saap_jax.report.pages.score import (
    Patterns,
    fusion_table,
    layer_ranks,
    pattern_notes,
    pattern_table,
    patterns,
    rank_agreement,
    rank_table,
    score_findings,
    unimportant,
)
from saap_jax.report.write import read_view
from saap_jax.runs.directory import RunDirectory
from saap_jax.types import Scores
from tests.report.shown import cells, printed

NAN, INF = np.nan, np.inf


def units(*attention: float, mlp: tuple[float, ...] = (1.0, 2.0)) -> Scores:
    """Return the scores of a model of one layer."""
    return {"attention": np.array([attention]), "mlp": np.array([mlp])}


class TestRankAgreement:
    def test_is_that_of_scipy_over_the_units_that_all_score(self):
        scores = np.random.default_rng(0).integers(0, 9, (3, 40)).astype(float)  # with ties
        scores[0, 3], scores[1, 5] = NAN, INF
        exists = np.isfinite(scores).all(axis=0)
        found = rank_agreement(scores)
        np.testing.assert_allclose(found, spearmanr(scores[:, exists], axis=1).statistic)

    @pytest.mark.parametrize("other", [(5.0, 5.0, 5.0), (NAN, 1.0, NAN), (NAN, NAN, NAN), ()], ids=str)
    def test_no_correlation_is_nan(self, other):
        matrix = rank_agreement([(1.0, 2.0, 3.0)[: len(other)], other])
        np.testing.assert_array_equal(matrix, [[1, NAN], [NAN, 1]])


def test_a_table_has_attention_below_and_mlp_above_the_diagonal():
    three = {
        "a": units(1.0, 2.0, 3.0, mlp=(1.0, 2.0, 3.0)),
        "[red]b": units(3.0, 2.0, 1.0, mlp=(1.0, 2.0, 3.0)),
        "flat": units(1.0, 1.0, 1.0, mlp=(1.0, 3.0, 2.0)),
    }
    rows = [[row.get(str(n)) for n in (1, 2, 3)] for row in rank_table(three).rows]
    wanted = [[None, 1.0, 0.5], [-1.0, None, 0.5], [NAN, NAN, None]]
    np.testing.assert_allclose(np.array(rows, np.float64), np.array(wanted, np.float64))
    text = printed(rank_table(three, "[red]web"))
    lines = [line.split() for line in text.splitlines() if re.match(r" *\d \S", line)]
    assert lines == [
        ["1", "a", "-", "1.00", "0.50"],
        ["2", "[red]b", "−1.00", "-", "0.50"],
        ["3", "flat", "n/a", "n/a", "-"],
    ]
    assert "scenario [red]web: attention units below the diagonal, " in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


# --- patterns ------------------------------------------------------------------------------------

IMPORTANCE = {
    "web": np.array([[1.0, 5.0, 3.0], [4.0, 2.0, NAN]]),
    "code": np.array([[10.0, 40.0, 50.0], [20.0, 30.0, NAN]]),
}
"""Five units. Orders of web 1 5 3 4 2 and of code 1 4 5 2 3: Σ d² = 10, so Spearman's ρ is 1 - 60 / 120."""

USAGE = {
    "web": np.array([[0.0, 1.0, 0.4], [0.6, 0.2, NAN]]),  # as importance
    "code": np.array([[1.0, 0.4, 0.2], [0.8, 0.6, NAN]]),  # the opposite
}


def example(*scenarios: str, usage: str | None = "used") -> Patterns:
    """Return the patterns of the numbers above, of all scenarios or those named."""
    scores = {name: {"i": {"mlp": IMPORTANCE[name]}, "used": {"mlp": USAGE[name]}} for name in scenarios or IMPORTANCE}
    return patterns(scores, "i", usage, 0.4)


def drawn(many: int, seed: int = 0, shape: tuple[int, int] = (4, 6)) -> dict[str, dict]:
    """Return random scores `i` and frequencies `u` of so many scenarios; layers have unequal widths."""
    random = np.random.default_rng(seed)
    gone = np.arange(shape[1]) >= random.integers(0, shape[1] + 1, shape[0])[:, None]

    def one(low: float, high: float) -> dict[str, np.ndarray]:
        values = random.uniform(low, high, shape)
        return {"attention": values[:, :2], "mlp": np.where(gone, NAN, values)}

    return {f"s{number}": {"i": one(1, 9), "u": one(0, 1)} for number in range(many)}


class TestUnimportant:
    @pytest.mark.parametrize(("share", "units", "count"), [(0.29, 100, 29), (0.2, 15, 3), (0.7, 10, 7), (0.199, 10, 1)])
    def test_counts_without_rounding_errors(self, share, units, count):
        """Floats alone would miscount 0.29 · 100."""
        assert unimportant(np.arange(float(units))[None], share).sum() == count
        assert int(0.29 * 100) == 28, "control"

    def test_ties_go_by_layer_then_index_and_layers_together(self):
        mask = unimportant(np.array([[2.0, 1.0, 1.0], [1.0, 1.0, NAN]]), 0.6)
        assert mask.tolist() == [[False, True, True], [True, False, False]]
        assert unimportant(np.array([[1.0, 2.0], [8.0, 9.0]]), 0.5).tolist() == [[True, True], [False, False]]


class TestPatterns:
    def test_by_hand(self):
        part = example().structures["mlp"]
        assert (part.units, part.lowest) == (5, 2)
        assert part.consistent.tolist() == [[True, False, False], [False, False, False]]
        assert (part.agreed, part.share) == (1, 0.2)
        assert part.chance == pytest.approx(0.16)
        assert part.task_specific == 1  # the first of layer 1: second lowest in code, second highest in web
        assert part.agreement == pytest.approx({"web": 0.5, "code": 0.5})
        assert part.usage == pytest.approx({"web": 0.44, "code": 0.6})
        assert part.usage_importance == pytest.approx({"web": 1.0, "code": -1.0})
        alone = example("web").structures["mlp"]
        assert np.isnan(alone.agreement["web"])
        assert (alone.agreed, alone.task_specific, alone.chance) == (2, 0, 0.4)

    def test_agreement_is_the_mean_over_the_others(self):
        order = np.array([[1.0, 2.0, 3.0]])
        scores = {name: {"i": {"mlp": values}} for name, values in {"a": order, "b": order, "c": -order}.items()}
        part = patterns(scores, "i", share=0.34).structures["mlp"]
        assert part.agreement == pytest.approx({"a": 0.0, "b": 0.0, "c": -1.0})
        assert (part.agreed, part.task_specific) == (0, 2), "opposite orders agree on nothing"

    def test_a_model_without_units_of_a_structure(self):
        scores = {s: {"i": {"attention": np.full((2, 3), NAN), "mlp": np.zeros((2, 0))}} for s in "ab"}
        found = patterns(scores, "i")
        for name, part in found.structures.items():
            assert (part.units, part.lowest, part.agreed, part.task_specific) == (0, 0, 0, 0)
            assert np.isnan([part.share, part.chance, *part.agreement.values()]).all()
            assert pattern_notes(found, name) == [f"No {name} units."]

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 1.0])
    def test_equal_scenarios_agree_on_everything(self, share):
        one = drawn(1)["s0"]
        for name, part in patterns({"a": one, "b": one}, "i", "u", share).structures.items():
            np.testing.assert_array_equal(part.consistent, unimportant(one["i"][name], share))
            assert part.task_specific == 0
            assert part.agreement == pytest.approx({"a": 1.0, "b": 1.0})

    def test_tables_and_notes(self):
        table = pattern_table(example(), "mlp")
        assert table.header == ["scenario", "mean usage %", "usage ~ importance", "importance ~ other scenarios"]
        assert cells(table) == [["web", "44.0", "1.00", "0.50"], ["code", "60.0", "−1.00", "0.50"]]
        assert pattern_table(example(usage=None), "mlp").header == ["scenario", "importance ~ other scenarios"]
        assert cells(pattern_table(example("web"), "mlp")) == [["web", "44.0", "1.00"]]
        assert pattern_notes(example(), "mlp") == [
            "1 of 5 mlp units (20.0 %) are among the lowest 40 % by i in all 2 scenarios; independent orders would "
            "give 16.0 %, equal ones 40.0 %.",
            "1 unit is among the lowest in one scenario and in the upper half of another.",
        ]
        (said,) = pattern_notes(example("web"), "mlp")
        assert said.endswith("with one scenario, consistently unimportant is no more than that.")
        (said, _) = pattern_notes(patterns(drawn(6, shape=(10, 100)), "i"), "attention")
        assert "independent orders would give 0.006 %, equal ones 20.0 %" in said, "a small chance is not none"


# --- the page ------------------------------------------------------------------------------------


def invented(scenarios: tuple[str, ...], estimators: tuple[str, ...] = ("random", "wanda", "activation_frequency")):
    dice = np.random.default_rng(0)
    return {
        f"{scenario}/{name}/{structure}": dice.uniform(0, 1, shape)
        for scenario in scenarios
        for name in estimators
        for structure, shape in {"attention": (4, 3), "mlp": (4, 9)}.items()
    }


def kept(path, arrays) -> RunDirectory:
    """Write a score run."""
    run = RunDirectory.open(path, {"keep_statistics": "all", "calibration": {"examples": 4}})
    run.save_arrays("scores", arrays)
    run.update(kind="score", status="finished", scenarios={"web": [4, 128]})
    return run


class TestPage:
    def test_says_what_the_scores_say(self, tmp_path):
        run = kept(tmp_path / "scored", invented(("web", "code")))
        found = score_findings(run)
        sections, said = {section.title: section for section in found.more}, " ".join(found.summary)
        assert "3 estimators scored all units (12 attention, 36 mlp) in 2 scenarios: web, code." in said
        assert len([block for block in found.blocks if isinstance(block, Table)]) == 2
        figures = [block for block in sections["Where importance lies"].blocks if isinstance(block, Figure)]
        assert [figure.title for figure in figures] == ["Mean rank by layer, web", "Mean rank by layer, code"]
        shown = painted(figures[0]).axes[0].collections[0].get_array()
        assert shown.shape == (3, 4)
        np.testing.assert_allclose(shown[1], 100 * layer_ranks(invented(("web",))["web/wanda/attention"]))
        assert "Patterns by scenario" in sections

    def test_one_scenario_and_one_estimator_leave_out_what_takes_more(self, tmp_path):
        run = kept(tmp_path / "scored", invented(("web",), ("wanda",)))
        titles = [section.title for section in read_view(run.path).sections]
        assert titles == ["Summary", "Where importance lies", "To reproduce"]


def test_layers_of_a_structure_are_one_row_of_a_fusion():
    sigmas = {"a": {"mlp/0": 1.0, "mlp/1": 2.0}, "b": {"mlp/0": 0.5, "mlp/1": 0.5}}
    weights = {name: {scope: 1 / (2 * sigma**2) for scope, sigma in each.items()} for name, each in sigmas.items()}
    table = fusion_table({"web": {"a+b": {"sigmas": sigmas, "weights": weights}}})
    assert cells(table) == [
        ["web", "a+b", "a", "mlp, 2 layers", "1 to 2", "0.125 to 0.5"],
        ["web", "a+b", "b", "mlp, 2 layers", "0.5", "2"],
    ]
