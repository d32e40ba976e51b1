"""Distributions of scores: comparable between estimators, by hand where that is possible."""

import math
import re

import numpy as np
import pytest

from saap_jax.report.kinds.distributions import distribution, distributions, log_axis, score_chart

NAN = math.nan
SCORES = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, NAN]])


class TestDistribution:
    def test_by_hand(self):
        one = distribution(SCORES)
        assert one is not None
        assert one.units == 5
        assert one.quantiles[2] == 1.0
        assert one.quantiles[1:4] == (0.5, 1.0, 2.0)
        # percentile ranks are 0.1, 0.3, 0.5 and 0.7, 0.9
        np.testing.assert_allclose(one.ranks, [0.3, 0.8])

    def test_does_not_change_with_the_unit_of_measure(self):
        one, other = distribution(SCORES), distribution(1e-9 * SCORES)
        assert one is not None
        assert other is not None
        assert one.quantiles == pytest.approx(other.quantiles)
        np.testing.assert_array_equal(one.ranks, other.ranks)
        squared = distribution(SCORES**2)
        assert squared is not None
        assert squared.quantiles != pytest.approx(one.quantiles), "but with their spread"
        np.testing.assert_array_equal(squared.ranks, one.ranks)

    def test_scores_that_are_not_positive_are_counted(self):
        one = distribution(np.array([[0.0, -1.0, 2.0, 3.0, 4.0]]))
        assert one is not None
        assert one.not_positive == 0.4
        assert not math.isnan(one.quantiles[0])
        negative = distribution(-SCORES)
        assert negative is not None
        assert all(map(math.isnan, negative.quantiles))

    def test_layers_without_units(self):
        one = distribution(np.array([[NAN, NAN], [1.0, 2.0]]))
        assert one is not None
        assert math.isnan(one.ranks[0])
        assert distribution(np.full((2, 2), NAN)) is None
        assert distribution(np.zeros((2, 0))) is None


class TestChart:
    def test_a_line_an_estimator(self):
        drawn = score_chart({"a": {"mlp": SCORES}, "b<": {"mlp": SCORES**3}}, "mlp", 20)
        assert re.findall(r'<th scope="row">(.*?)</th>', drawn) == ["a", "b&lt;"]
        assert "mean percentile rank in each layer: 30 80" in drawn
        assert "50 % 1," in drawn

    def test_shows_so_many(self):
        many = {f"e{number}": {"mlp": SCORES} for number in range(9)}
        assert score_chart(many, "mlp", 4).count('scope="row"') == 4

    def test_the_middle_stands_at_one(self):
        drawn = score_chart({"a": {"mlp": SCORES}}, "mlp", 20)
        axis = log_axis(list(distributions({"a": {"mlp": SCORES}}, "mlp").values()))
        place = float(re.search(r'class="middle" x="([\d.]+)%', drawn)[1])  # pyright: ignore[reportOptionalSubscript]
        assert place == pytest.approx(100 * axis.share(0.0))

    def test_scores_without_a_middle(self):
        assert "not above 0" in score_chart({"a": {"mlp": -SCORES}}, "mlp", 20)

    def test_nothing_to_show(self):
        assert score_chart({}, "mlp", 20) == ""
        assert score_chart({"a": {"attention": SCORES}}, "mlp", 20) == ""


@pytest.mark.parametrize("spread", [1.001, 50.0, 1e9])
def test_the_axis_has_powers_of_ten(spread):
    one = distribution(np.geomspace(1 / spread, spread, 99)[None])
    assert one is not None
    axis = log_axis([one])
    assert 3 <= len(axis.ticks) <= 5
    assert axis.low < 0 < axis.high
