"""Patterns over scenarios: hand-computed numbers, properties, and tables that are true to them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_jax.report.pages.score import _pattern_section, pattern_notes, pattern_table
from saap_jax.report.patterns import Patterns, patterns, unimportant
from tests.report.shown import cells, printed

NAN = np.nan

IMPORTANCE = {
    "web": np.array([[1.0, 5.0, 3.0], [4.0, 2.0, NAN]]),
    "code": np.array([[10.0, 40.0, 50.0], [20.0, 30.0, NAN]]),
}
"""Five units. Orders of web 1 5 3 4 2 and of code 1 4 5 2 3: Σ d² = 10, so Spearman's ρ is 1 - 60 / 120."""

USAGE = {
    "web": np.array([[0.0, 1.0, 0.4], [0.6, 0.2, NAN]]),  # as importance
    "code": np.array([[1.0, 0.4, 0.2], [0.8, 0.6, NAN]]),  # the opposite
}


def example(*scenarios: str, usage: str | None = "used", share: float = 0.4) -> Patterns:
    """Return the patterns of the numbers above, of all scenarios or those named."""
    scores = {name: {"i": {"mlp": IMPORTANCE[name]}, "used": {"mlp": USAGE[name]}} for name in scenarios or IMPORTANCE}
    return patterns(scores, "i", usage, share)


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
        assert unimportant({"mlp": np.arange(float(units))[None]}, share)["mlp"].sum() == count

    def test_floats_alone_would_miscount(self):
        assert math.floor(0.29 * 100) == 28

    def test_ties_go_by_layer_then_index(self):
        mask = unimportant({"mlp": np.array([[2.0, 1.0, 1.0], [1.0, 1.0, NAN]])}, 0.6)["mlp"]
        assert mask.tolist() == [[False, True, True], [True, False, False]]

    def test_structures_are_ranked_apart_and_layers_together(self):
        scores = {"attention": np.array([[100.0, 200.0]]), "mlp": np.array([[1.0, 2.0], [8.0, 9.0]])}
        masks = unimportant(scores, 0.5)
        assert masks["attention"].tolist() == [[True, False]]
        assert masks["mlp"].tolist() == [[True, True], [False, False]]

    def test_ends(self):
        values = {"mlp": IMPORTANCE["web"]}
        assert not unimportant(values, 0.0)["mlp"].any()
        np.testing.assert_array_equal(unimportant(values, 1.0)["mlp"], ~np.isnan(IMPORTANCE["web"]))


class TestNumbers:
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

    def test_one_scenario_has_nothing_to_agree_with(self):
        part = example("web").structures["mlp"]
        assert np.isnan(part.agreement["web"])
        assert (part.agreed, part.task_specific, part.chance) == (2, 0, 0.4)

    def test_agreement_is_the_mean_over_the_others(self):
        order = np.array([[1.0, 2.0, 3.0]])
        scores = {name: {"i": {"mlp": values}} for name, values in {"a": order, "b": order, "c": -order}.items()}
        assert patterns(scores, "i").structures["mlp"].agreement == pytest.approx({"a": 0.0, "b": 0.0, "c": -1.0})

    def test_a_model_without_units_of_a_structure(self):
        scores = {s: {"i": {"attention": np.full((2, 3), NAN), "mlp": np.zeros((2, 0))}} for s in "ab"}
        found = patterns(scores, "i")
        for name, part in found.structures.items():
            assert (part.units, part.lowest, part.agreed, part.task_specific) == (0, 0, 0, 0)
            assert np.isnan([part.share, part.chance, *part.agreement.values()]).all()
            assert pattern_notes(found, name) == [f"No {name} units."]
        assert _pattern_section(found) == []

    def test_float32_does_as_well(self):
        single = {s: {"i": {"mlp": v.astype(np.float32)}} for s, v in IMPORTANCE.items()}
        assert np.argwhere(patterns(single, "i", share=0.4).structures["mlp"].consistent).tolist() == [[0, 0]]


class TestProperties:
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 1.0])
    def test_equal_scenarios_agree_on_everything(self, share):
        one = drawn(1)["s0"]
        for name, part in patterns({"a": one, "b": one}, "i", "u", share).structures.items():
            np.testing.assert_array_equal(part.consistent, unimportant(one["i"], share)[name])
            assert part.task_specific == 0
            assert part.agreement == pytest.approx({"a": 1.0, "b": 1.0})

    def test_opposite_scenarios_agree_on_nothing(self):
        up = {"mlp": np.arange(10.0).reshape(2, 5)}
        part = patterns({"a": {"i": up}, "b": {"i": {"mlp": -up["mlp"]}}}, "i", share=0.3).structures["mlp"]
        assert (part.agreed, part.task_specific) == (0, 6)
        assert part.agreement == pytest.approx({"a": -1.0, "b": -1.0})

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000), share=st.floats(0, 1))
    def test_a_further_scenario_takes_away_only(self, seed, share):
        scores = drawn(3, seed)
        fewer = patterns({name: scores[name] for name in ("s0", "s1")}, "i", share=share)
        more = patterns(scores, "i", share=share)
        for name, part in more.structures.items():
            assert not (part.consistent & ~fewer.structures[name].consistent).any()
            assert part.agreed <= part.lowest <= part.units
            assert part.task_specific <= part.units

    def test_moves_with_the_units_and_knows_no_unit_of_measure(self):
        scores, order = drawn(2), np.array([5, 0, 3, 1, 4, 2])
        changed = {
            s: {
                e: {"attention": v["attention"], "mlp": (v["mlp"] if e == "u" else 1e-9 * v["mlp"] ** 3)[:, order]}
                for e, v in by.items()
            }
            for s, by in scores.items()
        }
        before, after = (patterns(each, "i", "u", 0.4).structures["mlp"] for each in (scores, changed))
        assert before.agreed > 0
        np.testing.assert_array_equal(after.consistent, before.consistent[:, order])
        assert after.consistent.tolist() != before.consistent.tolist()
        assert after._replace(consistent=0, usage=0) == before._replace(consistent=0, usage=0)

    def test_independent_orders_come_near_chance(self):
        part = patterns(drawn(2, shape=(40, 500)), "i", share=0.3).structures["mlp"]
        assert part.chance == pytest.approx(0.09, abs=1e-3)
        assert part.share == pytest.approx(part.chance, abs=0.015)
        assert abs(part.share - 0.3) > 0.1  # of equal orders


@pytest.mark.parametrize(("importance", "usage"), [("j", None), ("i", "j")])
def test_an_unknown_estimator(importance, usage):
    with pytest.raises(ValueError, match="expected scores of j in scenario s0, got those of: i, u"):
        patterns(drawn(2), importance, usage)


class TestTables:
    def test_cells(self):
        table = pattern_table(example(), "mlp")
        assert table.header == ["scenario", "mean usage %", "usage ~ importance", "importance ~ other scenarios"]
        assert cells(table) == [["web", "44.0", "1.00", "0.50"], ["code", "60.0", "−1.00", "0.50"]]
        assert pattern_table(example(usage=None), "mlp").header == ["scenario", "importance ~ other scenarios"]
        alone = pattern_table(example("web"), "mlp")
        assert alone.header == ["scenario", "mean usage %", "usage ~ importance"]
        assert cells(alone) == [["web", "44.0", "1.00"]]

    def test_notes(self):
        assert pattern_notes(example(), "mlp") == [
            "1 of 5 mlp units (20.0 %) are among the lowest 40 % by i in all 2 scenarios; independent orders would "
            "give 16.0 %, equal ones 40.0 %.",
            "1 unit is among the lowest in one scenario and in the upper half of another.",
        ]
        assert pattern_notes(example("web"), "mlp") == [
            "2 of 5 mlp units (40.0 %) are the lowest 40 % by i: with one scenario, consistently unimportant is no "
            "more than that."
        ]

    def test_a_small_chance_is_not_said_to_be_none(self):
        (said, _) = pattern_notes(patterns(drawn(6, shape=(10, 100)), "i"), "attention")
        assert "independent orders would give 0.006 %, equal ones 20.0 %" in said
        (said, _) = pattern_notes(patterns(drawn(6, shape=(10, 100)), "i", share=0.0), "attention")
        assert "independent orders would give 0.0 %, equal ones 0.0 %" in said

    def test_fits_a_terminal_and_takes_names_as_they_are(self):
        scores = {("[red]s & <b> of a long, long name " * 3)[:70] + str(n): s for n, s in enumerate(drawn(2).values())}
        text = printed(pattern_table(patterns(scores, "i", "u"), "mlp"))
        assert max(map(len, text.splitlines())) <= 100
        assert text.count("[red]s & <b>") >= 2
