"""Claims: a textbook's analysis of variance, the jackknife by hand, coverage of a known truth, and Holm's verdicts."""

import math

import numpy as np
import pytest
from claims import Crossed, Verdict, crossed, verdicts
from scipy import stats

from saap_jax.evaluation.resample import LEVEL

PENICILLIN = np.array([[89, 88, 97, 94], [84, 77, 92, 79], [81, 87, 87, 85], [87, 92, 89, 84], [79, 81, 80, 88]], float)
"""Yields of five blends by four treatments (Box, Hunter & Hunter, Statistics for Experimenters, 1978, table 7.1)."""


def of(difference: np.ndarray, articles: np.ndarray) -> Crossed:
    """Estimate from differences; B's losses are whatever."""
    b = np.random.default_rng(0).normal(3, 1, difference.shape[1])
    return crossed(b + difference, np.broadcast_to(b, difference.shape), articles)


def test_the_two_way_analysis_of_variance_of_a_textbook():
    """Mean 86; mean squares of blends 264 / 4 and of treatments 70 / 3 (table 7.3)."""
    found = of(PENICILLIN, np.array([7, 3, 5, 0]))
    blends, treatments = 264 / 4, 70 / 3
    assert found.value == pytest.approx(86)
    assert found.freedoms == pytest.approx((4, 3))
    assert found.variances == pytest.approx((blends / 20, treatments / 20))
    assert found.error == pytest.approx(math.sqrt((blends + treatments) / 20))
    freedom = (blends + treatments) ** 2 / (blends**2 / 4 + treatments**2 / 3)
    assert found.freedom == pytest.approx(freedom)
    assert found.half() == pytest.approx(stats.t.ppf(0.975, freedom) * found.error)
    assert found.half(0.5) == pytest.approx(stats.t.ppf(0.75, freedom) * found.error)


def test_articles_of_unequal_sizes_are_left_out_one_by_one():
    rng = np.random.default_rng(1)
    articles = rng.permutation(np.repeat(np.arange(9), [1, 1, 2, 2, 3, 4, 6, 9, 20]))
    difference = rng.normal(size=(5, 48)) + rng.normal(size=9)[articles] + rng.normal(size=(5, 1))
    found = of(difference, articles)
    without = np.array([difference[:, articles != each].mean() for each in range(9)])
    assert found.variances[1] == pytest.approx(8 / 9 * np.square(without - difference.mean()).sum())
    assert found.variances[0] == pytest.approx(difference.mean(axis=1).var(ddof=1) / 5)
    sizes = np.bincount(articles)
    assert found.freedoms == pytest.approx((4, 48**2 / np.square(sizes).sum() - 1))
    difference = difference[:, :45]
    means = difference.mean(axis=0).reshape(9, 5).mean(axis=1)
    assert of(difference, np.arange(45) // 5).variances[1] == pytest.approx(means.var(ddof=1) / 9)


def test_the_interval_is_never_narrower_than_students_of_the_seeds():
    """Satterthwaite's degrees of freedom grow with a second term faster than the standard error does."""
    difference = 4.0 + np.random.default_rng(2).normal(size=(5, 1)) + 0.3 * np.random.default_rng(3).normal(size=60)
    found = of(difference, np.arange(60))
    low, high = stats.t.interval(0.95, 4, difference.mean(), stats.sem(difference.mean(axis=1)))
    assert stats.t.ppf(0.975, found.freedom) * found.error < (high - low) / 2
    assert found.half() == pytest.approx((high - low) / 2)
    assert found.p_value == pytest.approx(stats.ttest_1samp(difference.mean(axis=1), 0).pvalue)


def test_p_values_agree_with_intervals():
    rng = np.random.default_rng(4)
    for scale in (0.0, 0.05, 0.1, 0.2, 0.4):
        found = of(scale + rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.2, (5, 40)), np.arange(40) // 2)
        assert found.half(1 - found.p_value) == pytest.approx(abs(found.value))
        assert (found.p_value < LEVEL) == (found.half() < abs(found.value))


def test_what_cannot_be_claimed():
    losses = np.random.default_rng(5).normal(size=(5, 8))
    same = crossed(losses, losses, np.arange(8))
    assert (same.value, same.error, same.half(), same.p_value) == (0, 0, 0, 1)
    assert of(np.full((5, 8), 0.25), np.arange(8)).p_value < 1e-99
    broken = crossed(np.where(losses > 1, np.inf, losses), losses, np.arange(8))
    assert math.isnan(broken.p_value)
    assert [each.said for each in verdicts([same, broken])][1] == "not finite"
    with pytest.raises(ValueError, match="^claims: expected .seeds, windows. of two seeds and two articles or more, "):
        crossed(losses[:1], losses[:1], np.arange(8))
    with pytest.raises(ValueError, match="8 windows of 1 articles"):
        crossed(losses, losses, np.zeros(8, int))


def simulated(trials: int, seeds: float, articles: float, both: float, windows: float = 0.15, **sizes) -> np.ndarray:
    """Simulate 5 seeds and 60 articles with these deviations, in nats; how often intervals hold the true difference.

    Of ours, and of Student's over windows as if they were independent. On text, differences of methods have deviations
    of 0.03 by seed, 0.05 to 0.1 by article, 0.1 to 0.2 by window.
    """
    rng, truth, covered = np.random.default_rng(trials), 0.03, np.zeros(2)
    many = rng.integers(sizes.get("fewest", 1), sizes.get("most", 4), 60, endpoint=True)
    of_window = np.repeat(np.arange(60), many)
    for _ in range(trials):
        by_article = rng.normal(0, articles, 60) + rng.normal(0, seeds, (5, 1)) + rng.normal(0, both, (5, 60))
        noise = rng.normal(0, windows, len(of_window)) + rng.normal(0, 0.03, (5, len(of_window)))
        difference = truth + by_article[:, of_window] + noise
        ours, means = crossed(difference, np.zeros_like(difference), of_window), difference.mean(axis=0)
        naive = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
        covered += [abs(ours.value - truth) <= ours.half(), abs(ours.value - truth) <= naive]
    return covered / trials


def test_intervals_cover_what_they_say_and_those_of_windows_do_not():
    ours, naive = simulated(600, seeds=0.03, articles=0.08, both=0.04)
    assert ours >= 0.95
    assert naive < 0.85, "negative control"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "how",
    [
        {"seeds": 0.03, "articles": 0.08, "both": 0.04},
        {"seeds": 0.1, "articles": 0.05, "both": 0.0, "windows": 0.05},
        {"seeds": 0.0, "articles": 0.1, "both": 0.0},
        {"seeds": 0.0, "articles": 0.0, "both": 0.1},
        {"seeds": 0.02, "articles": 0.1, "both": 0.02, "fewest": 1, "most": 20},
        {"seeds": 0.02, "articles": 0.0, "both": 0.0, "fewest": 2, "most": 2},
    ],
)
def test_intervals_cover_what_they_say_whatever_varies(how):
    ours, _ = simulated(8000, **how)
    assert ours >= 0.945  # of 0.95 in 8,000 trials two standard errors less


def test_verdicts_by_holm_and_what_could_not_be_seen():
    """P-values 0.001, 0.012, 0.03 and 0.2: Holm's 0.004, 0.036, 0.06 and 0.2."""
    one = Crossed(0.1, (1e-4, 1e-4), (4.0, 59.0), 128)
    estimates = []
    for p, sign in ((0.03, 1), (0.001, -1), (0.2, 1), (0.012, 1)):
        estimates.append(one._replace(value=sign * one.half(1 - p)))
        assert estimates[-1].p_value == pytest.approx(p)
    found = verdicts(estimates)
    assert [each.p_value for each in found] == pytest.approx([0.06, 0.004, 0.2, 0.036])
    seen = 100 * math.expm1(one.half(1 - LEVEL / 2))  # two were not significant
    said = f"not significant, differences below {seen:.1f} % cannot be seen"
    assert [each.said for each in found] == [said, "significantly lower", said, "significantly higher"]
    assert found[0].difference.percent[0] < seen
    raised = estimates[0]._replace(
        value=one.half(1 - LEVEL / 2) * (1 + 1e-9)
    )  # just as much more would have been significant
    assert [each.significant for each in verdicts([raised, *estimates[1:]])] == [True, True, False, True]
    low, high = (math.expm1(estimates[0].value + sign * one.half()) for sign in (-1, 1))
    assert found[0].difference.percent[1:] == pytest.approx((100 * low, 100 * high))
    assert verdicts([]) == []
    assert Verdict(found[0].difference, 0.06, 0.012).said.endswith("below 0.012 % cannot be seen")
