"""The paired bootstrap: all resamples by brute force, coverage of a known truth, what pairing is good for."""

import itertools

import jaxtyping
import numpy as np
import pytest

from saap_jax.evaluation.paired import paired_difference


def test_against_all_resamples():
    """Three windows have 27 ordered resamples, two seeds 4: their means, each as often as it occurs."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3))
    seeds, windows = (list(itertools.product(range(n), repeat=n)) for n in (2, 3))
    means = np.array([(a - b)[np.ix_(s, w)].mean() for s in seeds for w in windows])
    found = paired_difference(a, b, resamples=200_000, level=0.8)
    assert found.value == pytest.approx((a - b).mean(), rel=1e-12)
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.1, 0.9]), atol=0.01)
    wrong = np.array([(a - b)[:, list(w)].mean() for w in windows])  # seeds not drawn
    assert np.abs(np.quantile(wrong, [0.1, 0.9]) - [found.low, found.high]).max() > 0.06


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, truth, windows = np.random.default_rng(1), -0.1, 40
    covered = 0
    for trial in range(400):
        b = rng.normal(3, 1, (1, windows))
        a = b + rng.normal(truth, 0.3, (1, windows))
        found = paired_difference(a, b, resamples=500, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 400 <= 0.97


def test_pairing_is_what_makes_it_narrow():
    rng = np.random.default_rng(2)
    b = rng.normal(3, 1, (1, 60))
    a = b + rng.normal(-0.05, 0.05, (1, 60))
    paired, shuffled = paired_difference(a, b), paired_difference(a, rng.permuted(b, axis=1))
    assert paired.sure
    assert not shuffled.sure
    assert shuffled.high - shuffled.low > 10 * (paired.high - paired.low)


def test_equal_models_differ_by_nothing():
    a = np.random.default_rng(3).normal(size=(3, 8))
    assert tuple(paired_difference(a, a)) == (0, 0, 0)
    assert not paired_difference(a, a).sure


def test_a_shift_is_the_same_percentage_of_perplexity():
    a = np.random.default_rng(4).normal(size=(3, 8))
    assert paired_difference(a + np.log(1.25), a).percent == pytest.approx((25, 25, 25))


@pytest.mark.parametrize(("a", "b"), [((3, 8), (3, 7)), ((8,), (8,)), ((3, 1), (3, 1)), ((0, 4), (0, 4))])
def test_other_shapes_are_refused(a, b):
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        paired_difference(np.zeros(a), np.zeros(b))
