"""Differences: intervals invert their test, hold at any time, are corrected; what pairing is good for; tasks, Holm."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
from scipy import stats

from saap_jax.checks import Bound
from saap_jax.evaluation.differences import (
    ALL,
    Difference,
    check_bytes,
    check_difference,
    check_seconds,
    differences_against,
    paired_difference,
    paired_tasks,
    student_p,
)
from saap_jax.evaluation.evidence import log_evidence, threshold
from saap_jax.evaluation.resample import FEWEST, holm
from tests.evaluation.test_race import differing


@pytest.mark.parametrize("others", [1, 16])
def test_the_interval_is_what_neither_side_rejects(others):
    """Of means at either end, the test of the same differences has just as much evidence as a verdict takes."""
    a, b = np.random.default_rng(0).normal(size=(2, 1, 30))
    found, d = paired_difference(a, b, others=others), (a - b)[0]
    assert found.value == pytest.approx(d.mean(), rel=1e-12)
    for sign, end in ((1, found.low), (-1, found.high)):
        t = stats.ttest_1samp(sign * d, sign * end).statistic
        assert log_evidence(t, 30) == pytest.approx(threshold(others), abs=1e-6)
    assert stats.ttest_1samp(d, found.low).pvalue < 0.05 / others / 2, "wider than one look would need"


def missed(trials: int, looks, half, kind: str = "normal") -> float:
    """Count how often intervals that are looked at after so many windows miss the truth at some look."""
    truth = -0.1
    d = truth + differing(np.random.default_rng(0), kind, (trials, max(looks)))
    wrong = [np.abs(d[:, :n].mean(axis=1) - truth) > half(d[:, :n]) for n in looks]
    return float(np.any(wrong, axis=0).mean())


def ours(d) -> np.ndarray:
    found = differences_against(np.zeros((1, d.shape[1])), d[:, None], others=1)
    return np.array([each.high - each.value for each in found])


def student(d) -> np.ndarray:
    return stats.t.isf(0.025, d.shape[1] - 1) * d.std(axis=1, ddof=1) / math.sqrt(d.shape[1])


def test_the_interval_holds_at_all_looks_together():
    looks = range(8, 129, 8)
    assert missed(300, looks, ours) <= 0.05
    assert missed(300, looks, student) > 0.15, "negative control: one look's interval, looked at 16 times"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_how_far_it_holds_for_other_differences(kind):
    """Exponential ones, whose skewness is 2, are missed a little more often than normal ones may be."""
    assert missed(2000, range(8, 257, 8), ours, kind=kind) <= (0.08 if kind == "skewed" else 0.05)
    assert missed(2000, range(8, 257, 8), student, kind=kind) > 0.2, "negative control"


def test_windows_of_an_article_are_one_unit():
    """Windows that say what their article says: as units of their own they claim too much."""
    articles, truth, random, wrong = np.repeat(np.arange(16), 8), -0.1, np.random.default_rng(0), [0, 0]
    for _ in range(200):
        d = (truth + random.standard_normal(16))[articles][None]
        for place, known in enumerate((articles.tolist(), ())):
            found = paired_difference(d, np.zeros_like(d), articles=known)
            wrong[place] += not found.low <= truth <= found.high
    assert wrong[0] <= 10
    assert wrong[1] > 40, "negative control"
    sizes = np.repeat(np.arange(9), [1, 2, 3, 1, 2, 3, 1, 2, 5])
    d = random.normal(size=(1, 20))
    found, rest = paired_difference(d, np.zeros((1, 20)), articles=sizes.tolist()), d[0] - d.mean()
    assert (found.value, found.windows) == (pytest.approx(d.mean()), 9)
    assert found.low == pytest.approx(d.mean() - ours(np.bincount(sizes, rest)[None] * 9 / 20)[0])


def test_articles_of_other_lengths_are_no_spread():
    """A large difference that all windows share is sure, and the interval holds the truth as often as it says."""
    random, sizes = np.random.default_rng(1), [2, 9, 2, 2, 1, 1, 1, 1, 5, 3, 12, 1]
    articles, wrong, sure = np.repeat(np.arange(len(sizes)), sizes), 0, 0
    for _ in range(300):
        d = (0.3 + random.normal(0, 0.05, len(sizes))[articles] + random.normal(0, 0.1, sum(sizes)))[None]
        found = paired_difference(d, np.zeros_like(d), articles=articles.tolist())
        wrong, sure = wrong + (not found.low <= 0.3 <= found.high), sure + found.sure
    assert wrong <= 15
    assert sure == 300, "sums of articles, whose spread is that of their lengths, left most of them open"


def test_intervals_are_corrected_for_how_many_are_compared():
    random, wrong, alone = np.random.default_rng(2), 0, 0
    for _ in range(300):
        base, others = random.normal(size=(1, 12)), random.normal(size=(16, 1, 12))
        wrong += any(each.sure for each in differences_against(base, others))
        alone += any(stats.ttest_1samp((other - base)[0], 0).pvalue < 0.05 for other in others)
    assert wrong / 300 <= 0.05
    assert alone / 300 > 0.15, "negative control"


def test_students_p_value_is_that_of_scipy():
    for values in ([0.1, 0.3], [-0.2, 0.1, -0.4, 0.05], [2.0, 2.1, 2.2]):
        assert student_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert [student_p(each) for each in ([0.0], [0.3], [0.2, 0.2], [0.0, 0.0])] == [1, 0, 0, 1]


def test_of_several_seeds_it_is_no_narrower_than_students_of_the_seeds():
    random = np.random.default_rng(3)
    b = random.normal(3, 1, (3, 200))
    a = b + random.normal(0, 0.01, (3, 200)) + np.array([[0.1], [0.3], [0.2]])
    for others in (1, 5):
        found = paired_difference(a, b, others=others)
        interval = stats.ttest_1samp((a - b).mean(axis=1), 0).confidence_interval(1 - 0.05 / others)
        assert (found.low, found.high) == pytest.approx(interval)
    assert paired_difference(a[:1], b[:1]).low > 0, "of one seed the windows alone say how much it varies"
    equal = np.broadcast_to(a[:1], a.shape)
    assert paired_difference(equal, b[[0, 0, 0]])[1:3] == pytest.approx(paired_difference(a[:1], b[:1])[1:3])


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
    found = paired_difference(a, a)
    assert found == Difference(0, 0, 0, win_rate=0.5, largest=0, windows=8)
    assert not found.sure
    assert found.sentence == "A and B are the same: the difference is exactly 0"
    assert found.same


def test_what_rounding_alone_does_is_not_sure():
    a = np.random.default_rng(3).normal(size=(3, 8))
    found = paired_difference(a + 1e-6, a)
    assert found.value == pytest.approx(1e-6)
    assert found.low > 0
    assert found.same
    assert not found.sure
    assert "the same up to rounding: no window differs by more than 1e-06 nats" in found.sentence
    more = paired_difference(a + 2e-5, a)
    assert more.sure
    assert not more.same


def test_a_swap_of_a_and_b_mirrors():
    a, b = np.random.default_rng(6).normal(size=(2, 3, 40))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low), rel=1e-12)
    assert other.win_rate == pytest.approx(1 - one.win_rate)
    a[0], b[0] = 1.0, [1.0] * 10 + [2.0] * 10 + [0.0] * 20
    assert paired_difference(a[:1], b[:1]).win_rate == (10 + 0.5 * 10) / 40


@pytest.mark.parametrize("windows", [1, 2, FEWEST - 1])
def test_of_few_windows_nothing_is_sure(windows):
    a, b = np.random.default_rng(0).normal(size=(2, 1, windows))
    found = paired_difference(a - 5, b)
    assert np.isnan([found.low, found.high]).all()
    assert not found.sure
    assert not found.tied
    assert (
        f"without an interval, which takes 8 windows; here {'is' if windows == 1 else 'are'} {windows}"
        in found.sentence
    )
    more = np.random.default_rng(0).normal(size=(2, 1, FEWEST))
    assert paired_difference(more[0] - 9, more[1]).sure, "negative control"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_no_evidence_and_disturb_nobody(bad):
    base, others = np.zeros((1, FEWEST)), np.random.default_rng(1).normal(size=(3, 1, FEWEST))
    plain = differences_against(base, others)
    others[1, 0, 2] = bad
    one, found, two = differences_against(base, others)
    assert np.isnan([found.low, found.high]).all()
    assert not found.sure
    assert "not finite" in found.sentence
    assert (one, two) == (plain[0], plain[2])


def test_sentences():
    assert Difference(0.3, 0.2, 0.4).sentence == "A has a higher perplexity than B by 35.0 % (22.1 to 49.2 %)"
    assert Difference(-1e-4, -2e-4, 1e-4).sentence == (
        "A and B cannot be told apart: the difference is −0.0100 % (−0.0200 to +0.0100 %)"
    )
    assert "cannot be told apart" in Difference(0, -0.1, 0.1).sentence


@pytest.mark.parametrize(("a", "b"), [((3, 8), (3, 7)), ((8,), (8,)), ((3, 0), (3, 0)), ((0, 4), (0, 4))])
def test_other_shapes_are_refused(a, b):
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        paired_difference(np.zeros(a), np.zeros(b))


class TestHolm:
    def test_against_the_closed_test(self):
        """An adjusted p-value is the largest Bonferroni p-value of all sets of hypotheses with this one among them."""
        rng = np.random.default_rng(12)
        for m in range(1, 7):
            p = rng.random(m).round(1) ** 2  # ties, zeros
            subsets = [s for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
            closed = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(m)]
            np.testing.assert_allclose(holm(p), closed, rtol=1e-12)

    def test_nan_and_nothing(self):
        np.testing.assert_array_equal(holm([np.nan, 0.01, 0.02]), [np.nan, 0.02, 0.02])
        assert np.isnan(holm([np.nan, np.nan])).all()
        assert holm([]).shape == (0,)


# --- accuracies over tasks -------------------------------------------------------------------------


def outcomes(items: int, seeds: int = 1, share: float = 0.6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, items)) < share


@pytest.mark.parametrize("seeds", [1, 3])
def test_items_are_units_as_windows_are(seeds):
    a = {"one": outcomes(80, seeds, 0.7), "two": outcomes(40, seeds, 0.5, 1)}
    b = {"one": outcomes(80, seeds, 0.5, 2), "two": outcomes(40, seeds, 0.5, 3)}
    found = paired_tasks(a, b, others=3)
    for task in a:
        wanted = paired_difference(100.0 * a[task], 100.0 * b[task], others=3)
        assert found[task][:3] == pytest.approx(wanted[:3])
        assert found[task].win_rate == pytest.approx(0.5 + (a[task].mean() - b[task].mean()) / 2)
    assert found[ALL].value == pytest.approx(np.mean([found[task].value for task in a]))
    assert found["two"].high - found["two"].low > found[ALL].high - found[ALL].low
    assert paired_tasks({"two": a["two"]}, {"two": b["two"]}, others=3)["two"] == found["two"]
    assert paired_tasks(b, a, others=3)[ALL][:3] == pytest.approx([-found[ALL][place] for place in (0, 2, 1)])


def test_over_all_tasks_of_one_size_it_is_as_of_their_means():
    """Where items of two tasks are independent, the mean of both has half the variances' sum, over two."""
    a, b = ({name: outcomes(400, share=share, seed=seed + k) for k, name in enumerate("tu")} for share, seed in
            ((0.7, 0), (0.6, 7)))  # fmt: skip
    found = paired_tasks(a, b)
    halves = [found[task].high - found[task].value for task in "tu"]
    assert found[ALL].high - found[ALL].value == pytest.approx(math.hypot(*halves) / 2)


def test_over_all_tasks_it_is_no_narrower_than_students_of_the_seeds():
    """A seed that helps one task helps all of them: more tasks do not tell more of seeds."""
    b = {task: outcomes(400, seeds=3, share=0.5, seed=at) for at, task in enumerate("tuvw")}
    a = {task: each | (np.arange(400) % 20 < np.array([[0], [2], [4]])) for task, each in b.items()}
    means = np.mean([100.0 * (a[task] ^ b[task]).mean(axis=1) for task in a], axis=0)
    half = stats.t(2).ppf(0.975) * means.std(ddof=1) / 3**0.5
    found = paired_tasks(a, b)
    assert found[ALL].high - found[ALL].value == pytest.approx(half)
    assert half > math.hypot(*(found[task].high - found[task].value for task in a)) / 4, "control: tasks by themselves"


@pytest.mark.slow
def test_the_interval_of_points_covers_the_truth():
    rng, covered = np.random.default_rng(10), 0
    for _ in range(1000):  # A alone is right on 15 % of the items, B alone on 10 %: 5 points
        draw = rng.random(400)
        a, b = (draw < 0.15) | (draw > 0.5), ((draw >= 0.15) & (draw < 0.25)) | (draw > 0.5)
        found = paired_tasks({"t": a[None]}, {"t": b[None]})["t"]
        covered += found.low <= 5 <= found.high
    assert covered / 1000 >= 0.95


def test_planted_difference():
    base = outcomes(400)
    worse = base.copy()
    worse[0, np.flatnonzero(base[0])[:40]] = False
    found = paired_tasks({"t": worse}, {"t": base})["t"]
    assert found.value == pytest.approx(-10)
    assert found.sure
    assert found.sentence.startswith("A has a lower accuracy than B by 10.0 points (")
    one = base.copy()
    one[0, 0] = ~one[0, 0]
    assert not paired_tasks({"t": one}, {"t": base})["t"].sure
    few = paired_tasks({"t": np.ones((1, 7), bool)}, {"t": np.zeros((1, 7), bool)})["t"]
    assert few.sentence == (
        "who is better is not known: the difference is +100.0 points, without an interval, which takes 8 items; "
        "here are 7"
    )


# --- limits: what is just within holds, what is just beyond breaks ---------------------------------


def shifted(percent: float, windows: int = 12):
    b = np.random.default_rng(0).normal(4, 1, (1, windows))
    return paired_difference(b + math.log1p(percent / 100), b)


@pytest.mark.parametrize(
    ("percent", "limit", "passed"), [(2.0, 1.0, False), (2.0, 2.0, True), (2.0, 1.999, False), (-3.0, 0.0, True)]
)
def test_perplexity(percent, limit, passed):
    check = check_difference("ppl@16 a", shifted(percent), limit)
    assert check.passed == passed
    shown = f"{percent:+.1f}".replace("-", "−")
    assert check.measured == f"{shown} % ({shown} to {shown} %)"
    assert check.limit == f"+{limit:g} %"


def test_identical_models_keep_a_limit_of_0():
    assert check_difference("m", shifted(0.0), 0.0)[3:] == ("0 %", True)
    assert check_difference("m", shifted(1e-4), 0.0)[3:] == ("0 % up to rounding", True)
    assert not check_difference("m", shifted(0.01), 0.0).passed


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["model", "baseline", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_breaks_every_limit(bad, which):
    a, b = np.zeros((2, 1, 4))
    for place in which:
        (a, b)[place][0, 1] = bad
    check = check_difference("m", paired_difference(a, b), 1e9)
    assert not check.passed
    assert "not finite" in check.measured


def test_bytes_and_seconds():
    assert check_bytes("max_size", "weights", Bound(80.0, "percent"), 80, 100).passed
    assert not check_bytes("max_size", "weights", Bound(80.0, "percent"), 81, 100).passed
    assert check_bytes("max_size", "weights", Bound(300.0 * 2**20, "amount"), 300 * 2**20, 1).passed
    check = check_bytes("max_size", "weights", Bound(300.0 * 2**20, "amount"), 300 * 2**20 + 1, 600 * 2**20)
    assert not check.passed
    assert (check.limit, check.measured) == ("300.0 MiB", "300.0 MiB, 50.0 % of 600.0 MiB")
    assert check_seconds(105.0, 1.05, 1.0).passed
    check = check_seconds(105.0, 1.06, 1.0)
    assert not check.passed
    assert check.measured == "1,060.0 ms, 106.0 % of 1,000.0 ms"
