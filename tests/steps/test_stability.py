"""Fluctuation, the stability indicator and the reduction of scenarios, against numbers worked out by hand."""

import numpy as np
import pytest

from saap_jax.steps.score.stability import (
    fluctuation_of,
    reduce_scenarios,
    stabilised,
    standardised,
)


def one(values) -> dict:
    return {"mlp": np.asarray(values, float)}


class TestFluctuation:
    def test_is_std_over_mean_of_the_examples(self):
        got = fluctuation_of(one([[[1.0, 2.0]], [[3.0, 2.0]]]))["mlp"]
        np.testing.assert_array_equal(got, [[0.5, 0.0]])

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e-20])
    def test_is_exactly_zero_where_all_examples_agree(self, value):
        np.testing.assert_array_equal(fluctuation_of(one(np.full((3, 1, 2), value)))["mlp"], [[0.0, 0.0]])

    def test_refuses_a_single_example(self):
        with pytest.raises(ValueError, match="mlp for two examples or more, got 1"):
            fluctuation_of(one(np.ones((1, 1, 2))))

    def test_refuses_negative_scores_by_place(self):
        with pytest.raises(ValueError, match=r"got -2 for mlp unit 1 in layer 0 on example 1"):
            fluctuation_of(one([[[1.0, 2.0]], [[1.0, -2.0]]]))


class TestIndicator:
    def test_has_mean_zero_and_std_one_in_each_layer(self):
        values = np.random.default_rng(0).uniform(0, 2, (3, 50))
        got = standardised(values)
        np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose(got.std(axis=1), 1, rtol=1e-12)
        assert (np.argsort(got, axis=1) == np.argsort(values, axis=1)).all()

    def test_standardises_within_the_layer_only(self):
        values = np.random.default_rng(0).uniform(0, 2, (2, 6))
        got = standardised(values)
        np.testing.assert_allclose(standardised(values * [[1.0], [9.0]]), got, rtol=1e-12)
        assert np.abs(standardised(values.reshape(1, -1)).reshape(2, 6) - got).max() > 1e-3

    def test_is_zero_where_a_layer_has_no_spread_or_one_unit(self):
        got = standardised(np.array([[0.1, 0.1, 0.1], [7.0, np.nan, np.nan], [np.nan] * 3]))
        np.testing.assert_array_equal(got, [[0, 0, 0], [0, np.nan, np.nan], [np.nan] * 3])


class TestStabilised:
    def test_neither_zero_scores_nor_large_weights_are_a_problem(self):
        got = stabilised(one([[0.0, 1.0, np.nan]]), one([[0.0, 40.0, np.nan]]), 100.0)["mlp"]
        np.testing.assert_array_equal(got, [[0.0, 1.0, np.nan]])


class TestScenarios:
    prose = one([[4.0, 1.0], [2.0, 3.0]])
    code = one([[10.0, 40.0], [20.0, np.nan]])

    def test_mean_and_max(self):
        scenarios = {"prose": self.prose, "code": one([[10.0, 40.0], [20.0, 1.0]])}
        np.testing.assert_array_equal(reduce_scenarios(scenarios, "mean")["mlp"], [[7, 20.5], [11, 2]])
        np.testing.assert_array_equal(reduce_scenarios(scenarios, "max")["mlp"], [[10, 40], [20, 3]])

    def test_min_rank_is_the_best_place_in_any_scenario(self):
        # places: prose 1 4 / 3 2, code 3 1 / 2 4; the best of both 1 1 / 2 2 of 4
        scenarios = {"prose": self.prose, "code": one([[10.0, 40.0], [20.0, 1.0]])}
        np.testing.assert_array_equal(reduce_scenarios(scenarios, "min_rank")["mlp"], [[1, 1], [0.75, 0.75]])

    def test_equal_scores_share_their_mean_rank(self):
        got = reduce_scenarios({"a": one([[5.0, 5.0, 1.0]])}, "min_rank")["mlp"]
        np.testing.assert_allclose(got, [[2.5 / 3, 2.5 / 3, 1 / 3]], rtol=1e-12)

    @pytest.mark.parametrize("reduction", ["mean", "max", "min_rank"])
    def test_missing_units_stay_missing(self, reduction):
        got = reduce_scenarios({"a": self.code, "b": self.code}, reduction)["mlp"]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(self.code["mlp"]))
        assert np.nanargmax(got) == 1
