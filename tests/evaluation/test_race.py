"""Races: the e-value against its integral, who leaves when, and by simulation that the best are not lost."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from saap_jax.evaluation import evidence as module
from saap_jax.evaluation.differences import differences_against
from saap_jax.evaluation.evidence import boundary, log_evidence
from saap_jax.evaluation.race import pairwise, race_state

LOOKS = tuple(range(8, 129, 8))


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.4, 1.5])
def test_the_e_value_is_the_bayes_factor_with_the_right_haar_prior(monkeypatch, shift):
    """Both marginal likelihoods by numerical integration over σ (as dσ / σ) and the standardised mean."""
    monkeypatch.setattr(module, "SCALES", (0.3,))
    d = np.random.default_rng(0).standard_normal(9) + shift

    def marginal(effect: float) -> float:
        density = lambda log_s: np.exp(stats.norm.logpdf(d, effect * np.exp(log_s), np.exp(log_s)).sum())  # noqa: E731
        return integrate.quad(density, -6, 6, limit=200)[0]

    own = lambda effect: stats.norm.pdf(effect, 0, math.sqrt(0.3)) * marginal(effect)  # noqa: E731
    below, above = (integrate.quad(own, *ends, limit=200)[0] for ends in ((-5, 0), (0, 5)))
    t = math.sqrt(9) * d.mean() / d.std(ddof=1)
    for found, expected in ((log_evidence(t, 9), 2 * above), (log_evidence(-t, 9), 2 * below)):
        assert found == pytest.approx(math.log(expected / marginal(0.0)), rel=1e-4, abs=1e-4)


def test_evidence_of_a_mean_above_grows_with_t():
    """So that a mean below 0 crosses a bound less often than 0 does, and the test is one of "0 or below"."""
    for count in (8, 24, 1000):
        evidence = log_evidence(np.linspace(-40, 40, 400), count)
        assert (np.diff(evidence) > 0).all()
    assert log_evidence(math.inf, 8) > 10 > 0 > log_evidence(-math.inf, 8)


def test_the_boundary_is_where_the_e_value_reaches_the_threshold():
    for count in (8, 50, 1000):
        assert log_evidence(boundary(count, 6.0), count) == pytest.approx(6.0, abs=1e-6)
    assert boundary(8, 60.0) == math.inf


def losses_of(gaps, windows=128, deviation=0.1, seeds=1, seed=0):
    """Return losses of variants that differ by `gaps` on average, on windows that are hard or easy for all."""
    random = np.random.default_rng(seed)
    hard = 3 + random.normal(0, 0.5, windows)
    return [hard + gap + random.normal(0, deviation, (seeds, windows)) for gap in gaps]


def test_the_worst_leave_first_and_are_judged_no_further():
    losses = losses_of([0.0, 0.02, 0.2, 1.0])
    verdict = race_state(losses, LOOKS)
    assert 0 in verdict.left
    assert 2 not in verdict.left
    assert verdict.windows[3] == 8 <= verdict.windows[2] < 128
    cut = [each[:, :count] for each, count in zip(losses, verdict.windows, strict=True)]
    assert race_state(cut, LOOKS) == verdict  # nothing else was read


def test_a_race_goes_on_from_what_there_is():
    losses = losses_of([0.0, 0.01, 1.0])
    verdict = race_state([each[:, :8] for each in losses], LOOKS)
    assert (verdict.left, verdict.windows, verdict.ending, verdict.next) == ((0, 1), (8, 8, 8), "", 16)
    assert race_state([each[:, :0] for each in losses], LOOKS).next == 8


def test_endings():
    losses = losses_of([0.0, 0.0, 0.5])
    assert race_state(losses, LOOKS).ending == "spent"
    tied = race_state(losses, LOOKS, margin=0.1)
    assert (tied.ending, tied.left) == ("tied", (0, 1))
    assert max(tied.windows) < 128
    assert race_state(losses[:1], LOOKS).ending == "alone"
    assert race_state([losses[0], losses[2]], LOOKS).ending == "alone"


def test_equal_keep_sets_stay_together():
    losses = losses_of([0.0])
    twice = [losses[0], losses[0] + 1e-7]  # rounding
    assert race_state(twice, LOOKS).left == (0, 1)
    assert race_state(twice, LOOKS, margin=0.01).ending == "tied"
    assert race_state([losses[0], losses[0] + 1e-3], LOOKS).left == (0,)  # surely worse: on every window by as much


def test_what_is_not_finite_is_worse_than_what_is():
    losses = losses_of([0.0, 0.0, 0.0])
    losses[2][0, 3] = np.inf
    assert race_state(losses, LOOKS).windows[2] == 8
    assert race_state([losses[2], losses[2] + 1], LOOKS).left == (0, 1)


def test_seeds_are_averaged():
    losses = losses_of([0.0, 0.05], seeds=3)
    found = pairwise(np.stack([each.mean(0) for each in losses]))
    difference = (losses[1] - losses[0]).mean(0)
    assert found.gap[1, 0] == pytest.approx(difference.mean())
    assert found.t[1, 0] == pytest.approx(stats.ttest_1samp(difference, 0).statistic)


def test_who_leaves_is_surely_worse_by_the_interval_that_tables_show():
    """A race, a table and `saap ab` cannot say different things: all go by one interval."""
    losses = losses_of([0.0, 0.01, 0.05, 0.2])
    for count in LOOKS:
        left = race_state([each[:, :count] for each in losses], (count,)).left
        found = [differences_against(each[:, :count], np.stack(losses)[:, :, :count], others=3) for each in losses]
        surely = {worse for row in found for worse, each in enumerate(row) if each.low > 0}
        assert {*left} == {0, 1, 2, 3} - surely


# --- simulated -------------------------------------------------------------------------------------


def differing(random, kind: str, size) -> np.ndarray:
    """Draw noise of variance 1: normal, with heavy tails, or skewed."""
    draws = {
        "normal": lambda: random.standard_normal(size),
        "heavy": lambda: random.standard_t(4, size) / math.sqrt(2),
        "skewed": lambda: random.exponential(1, size) - 1,
    }
    return draws[kind]()


TWO_BEST, ALL_BEST = (0, 0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8), (0,) * 8


def lost(kind: str, races: int, judge, gaps=TWO_BEST, kept=frozenset({0, 1})) -> float:
    """Count the share of races in which one of the variants `kept`, which are best, was thrown out, of eight."""
    random, gaps, count = np.random.default_rng(0), np.array(gaps), 0
    for _ in range(races):
        noise = differing(random, kind, (8, 64)) * (0.05 + 0.2 * np.sqrt(gaps))[:, None]
        losses = 3 + random.normal(0, 0.5, 64) + gaps[:, None] + noise
        count += not kept <= set(judge([row[None] for row in losses]))
    return count / races


def plain(losses) -> list[int]:
    """Look at plain 95 % intervals every 8 windows: what a race must not do."""
    left = list(range(len(losses)))
    for windows in range(8, 65, 8):
        values = np.stack([losses[each][0, :windows] for each in left])
        gap = values[:, None] - values
        low = gap.mean(-1) - 1.96 * gap.std(-1, ddof=1) / math.sqrt(windows)
        left = [each for each, out in zip(left, (low > 0).any(1), strict=True) if not out]
    return left


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_two_thousand_races_lose_the_best_in_at_most_one_of_twenty(kind):
    assert lost(kind, 2000, lambda losses: race_state(losses, range(8, 65, 8)).left) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_one_of_eight_equals_is_lost_in_at_most_one_of_twenty(kind):
    assert lost(kind, 1000, lambda losses: race_state(losses, range(8, 65, 8)).left, ALL_BEST, {0}) <= 0.05


def test_plain_intervals_lose_the_best_often():
    assert lost("normal", 100, plain) > 0.15


@pytest.mark.slow
def test_twenty_variants_take_a_fifth_of_all_evaluations():
    """At the precision of 1,024 windows: gaps as between pruning rules, ties sure within half a per cent."""
    shares = []
    for seed in range(10):
        random = np.random.default_rng(seed)
        gaps = np.concatenate([[0, 0.002], random.exponential(0.3, 18)])
        noise = random.standard_normal((20, 1024)) * (0.05 + 0.2 * np.sqrt(gaps))[:, None]
        losses = 3 + random.normal(0, 0.5, 1024) + gaps[:, None] + noise
        verdict = race_state([row[None] for row in losses], range(16, 1025, 16), margin=0.005)
        assert set(verdict.left) <= set(np.flatnonzero(gaps < 0.02))
        shares.append(sum(verdict.windows) / losses.size)
    assert np.median(shares) <= 0.2
