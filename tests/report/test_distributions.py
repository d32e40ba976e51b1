"""Distributions of scores: comparable between estimators, by hand where that is possible."""

import math
import re

import numpy as np
import pytest

from saap_jax.report.kinds.distributions import distribution, distributions, log_axis, score_chart
from saap_jax.report.page.blocks import Band, Heat
from saap_jax.report.page.strips import chart_html

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


def chart(by_estimator: dict, limit: int = 20):
    found = score_chart(by_estimator, "mlp", limit)
    assert found is not None
    return found


class TestChart:
    def test_a_line_an_estimator(self):
        drawn = chart({"a": {"mlp": SCORES}, "b<": {"mlp": SCORES**3}})
        assert [strip.name for strip in drawn.strips] == ["a", "b<"]
        html = chart_html(drawn)
        assert re.findall(r'<th scope="row">(.*?)</th>', html) == ["a", "b&lt;"]
        assert "mean percentile rank in each layer: 30 80" in html
        assert "50 % 1," in html

    def test_shows_so_many(self):
        many = {f"e{number}": {"mlp": SCORES} for number in range(9)}
        assert len(chart(many, 4).strips) == 4

    def test_is_of_the_numbers(self):
        sizes, ranks = chart({"a": {"mlp": SCORES}}).strips[0].cells
        assert isinstance(sizes, Band)
        assert isinstance(ranks, Heat)
        one = distribution(SCORES)
        assert one is not None
        assert sizes.quantiles == pytest.approx([math.log10(value) for value in one.quantiles])
        assert ranks.shares == pytest.approx([0.3, 0.8])

    def test_the_middle_stands_at_one(self):
        drawn = chart_html(chart({"a": {"mlp": SCORES}}))
        axis = log_axis(list(distributions({"a": {"mlp": SCORES}}, "mlp").values()))
        place = float(re.search(r'class="middle" x="([\d.]+)%', drawn)[1])  # pyright: ignore[reportOptionalSubscript]
        assert place == pytest.approx(100 * axis.share(0.0))

    def test_scores_without_a_middle(self):
        assert "not above 0" in chart_html(chart({"a": {"mlp": -SCORES}}))

    def test_nothing_to_show(self):
        assert score_chart({}, "mlp", 20) is None
        assert score_chart({"a": {"attention": SCORES}}, "mlp", 20) is None


@pytest.mark.parametrize("spread", [1.001, 50.0, 1e9])
def test_the_axis_has_powers_of_ten(spread):
    one = distribution(np.geomspace(1 / spread, spread, 99)[None])
    assert one is not None
    axis = log_axis([one])
    assert 3 <= len(axis.ticks) <= 5
    assert axis.low < 0 < axis.high
