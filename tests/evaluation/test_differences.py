"""The paired bootstrap: brute force, coverage of a known truth, what pairing is good for; many, tasks, and Holm."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest

from saap_jax.config.checks import Bound
from saap_jax.evaluation.differences import (
    ALL,
    Difference,
    check_bytes,
    check_difference,
    check_seconds,
    differences_against,
    p_values_against,
    paired_difference,
    paired_tasks,
)
from saap_jax.evaluation.resample import FEWEST, holm, smallest_p_value


@pytest.fixture
def few_suffice(monkeypatch):
    """Give intervals of any number of windows: what they are is easily told for few."""
    monkeypatch.setattr("saap_jax.evaluation.resample.FEWEST", 1)
    monkeypatch.setattr("saap_jax.evaluation.differences.FEWEST", 1)


@pytest.mark.usefixtures("few_suffice")
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


def coverage(seeds: int, between_seeds: float, trials: int, windows: int = 100) -> float:
    """Return how often the 95 % interval holds the true difference, on simulated losses.

    A seed of calibration moves A as a whole, a window is hard for both, and each loss has noise of its own.
    """
    rng, truth, covered = np.random.default_rng(seeds), -0.1, 0
    for trial in range(trials):
        b = rng.normal(3, 1, (1, windows)) + rng.normal(0, 0.02, (seeds, windows))
        by_seed, by_window = rng.normal(0, between_seeds, (seeds, 1)), rng.normal(0, 0.3, (1, windows))
        a = b + truth + by_seed + by_window + rng.normal(0, 0.02, (seeds, windows))
        found = paired_difference(a, b, resamples=400, seed=trial)
        covered += found.low <= truth <= found.high
    return covered / trials


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says():
    assert 0.93 <= coverage(seeds=1, between_seeds=0.0, trials=1000) <= 0.97
    assert 0.93 <= coverage(seeds=40, between_seeds=0.1, trials=300) <= 0.97


@pytest.mark.slow
@pytest.mark.usefixtures("few_suffice")
def test_below_the_fewest_the_interval_does_not_cover():
    """Why `FEWEST` is what it is: with so many, errors are about twice as frequent as the level says."""
    covered = {windows: coverage(1, 0.0, trials=400, windows=windows) for windows in (2, 4, FEWEST)}
    assert covered[2] < 0.6
    assert covered[4] < 0.85
    assert 0.86 <= covered[FEWEST] <= 0.92


@pytest.mark.parametrize("windows", [1, 2, FEWEST - 1])
def test_of_few_windows_nothing_is_sure(windows):
    a, b = np.random.default_rng(0).normal(size=(2, 1, windows))
    found = paired_difference(a - 5, b)
    assert found.value == pytest.approx((a - 5 - b).mean())
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert not found.sure
    assert found.sentence.startswith("who is better is not known: the difference is −")
    assert f"which takes 8 windows; here {'is' if windows == 1 else 'are'} {windows}" in found.sentence
    assert paired_difference(a, a).sentence == "A and B are the same: the difference is exactly 0"
    more = np.random.default_rng(0).normal(size=(2, 1, FEWEST))
    assert paired_difference(more[0] - 5, more[1]).sure, "negative control"


def test_of_three_seeds_the_interval_is_too_narrow_as_the_docstring_says():
    assert coverage(seeds=3, between_seeds=0.3, trials=200) < 0.9


@pytest.mark.slow
def test_the_p_value_is_as_often_small_as_it_says_where_there_is_no_difference():
    rng, small = np.random.default_rng(5), 0
    for trial in range(600):
        b = rng.normal(3, 1, (1, 80))
        small += paired_difference(b + rng.normal(0, 0.3, b.shape), b, resamples=400, seed=trial).p_value < 0.1
    assert 0.07 <= small / 600 <= 0.13


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
    assert found == Difference(0, 0, 0, win_rate=0.5, p_value=1, largest=0, windows=8)
    assert not found.sure
    assert found.sentence == "A and B are the same: the difference is exactly 0"
    assert found.same


def test_what_rounding_alone_does_is_said():
    a = np.random.default_rng(3).normal(size=(3, 8))
    found = paired_difference(a + 1e-6, a)
    assert found.value == pytest.approx(1e-6)
    assert found.sure
    assert found.same
    assert "the same up to rounding: no window differs by more than 1e-06 nats" in found.sentence
    assert not paired_difference(a + 2e-5, a).same


def test_a_swap_of_a_and_b_mirrors():
    a, b = np.random.default_rng(6).normal(size=(2, 3, 40))
    one, other = paired_difference(a, b, seed=7), paired_difference(b, a, seed=7)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low), rel=1e-12)
    assert other.win_rate == pytest.approx(1 - one.win_rate)
    assert other.p_value == one.p_value
    assert one.low != pytest.approx(-one.high, rel=1e-3), "not a mirror by itself"


@pytest.mark.usefixtures("few_suffice")
def test_win_rate_and_p_value_by_hand():
    b = np.full((1, 4), 2.0)
    a = b + np.array([[-1.0, -1.0, 0.0, 0.5]])  # two windows won, one tie, one lost
    found = paired_difference(a, b, resamples=200_000)
    assert found.win_rate == (2 + 0.5) / 4
    means = np.array([np.mean(draw) for draw in itertools.product((a - b)[0], repeat=4)])
    assert found.p_value == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.005)


@pytest.mark.parametrize("resamples", [1, 39, 9_999])
def test_the_smallest_p_value(resamples):
    b = np.random.default_rng(8).normal(size=(1, 20))
    assert paired_difference(b - 1, b, resamples=resamples).p_value == smallest_p_value(resamples)
    assert smallest_p_value(resamples) == min(1, 2 / (resamples + 1))


def test_more_windows_than_fit_at_once_are_drawn_in_parts(monkeypatch):
    a, b = np.random.default_rng(9).normal(size=(2, 3, 50))
    whole = paired_difference(a, b, resamples=101)
    monkeypatch.setattr("saap_jax.evaluation.resample._HELD", 200)
    assert paired_difference(a, b, resamples=101)[:7] == pytest.approx(whole[:7], rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_no_evidence(bad):
    a, b = np.zeros((2, 1, FEWEST))
    a[0, 2] = bad
    found = paired_difference(a, b)
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert not found.sure
    assert "not finite" in found.sentence
    assert np.isnan(paired_difference(a, a).p_value)


def test_sentences():
    assert Difference(0.3, 0.2, 0.4).sentence == "A has a higher perplexity than B by 35.0 % (22.1 to 49.2 %)"
    assert Difference(-1e-4, -2e-4, 1e-4).sentence == (
        "A and B cannot be told apart: the difference is −0.0100 % (−0.0200 to +0.0100 %)"
    )
    assert "cannot be told apart" in Difference(0, -0.1, 0.1).sentence


def test_a_shift_is_the_same_percentage_of_perplexity():
    a = np.random.default_rng(4).normal(size=(3, 8))
    assert paired_difference(a + np.log(1.25), a).percent == pytest.approx((25, 25, 25))


@pytest.mark.parametrize(("a", "b"), [((3, 8), (3, 7)), ((8,), (8,)), ((3, 0), (3, 0)), ((0, 4), (0, 4))])
def test_other_shapes_are_refused(a, b):
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        paired_difference(np.zeros(a), np.zeros(b))


def paired_items(a, b, **options):
    return paired_tasks({"task": a[None]}, {"task": b[None]}, **options)["task"]


class TestItems:
    @pytest.mark.usefixtures("few_suffice")
    def test_against_all_resamples(self):
        a = np.array([True, True, False, True, True])
        b = np.array([True, False, False, False, True])
        found = paired_items(a, b, resamples=200_000)
        draws = itertools.product(a.astype(int) - b, repeat=5)
        means = np.array([100 * np.mean(draw) for draw in draws])
        assert found.value == 40
        assert found.win_rate == (2 + 3 / 2) / 5
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
        assert found.p_value == pytest.approx(2 * (means <= 0).mean(), abs=0.005)

    @pytest.mark.slow
    def test_the_interval_covers_the_truth(self):
        rng, covered = np.random.default_rng(10), 0
        for trial in range(2000):  # A alone is right on 15 % of the items, B alone on 10 %: 5 points
            draw = rng.random(400)
            a, b = (draw < 0.15) | (draw > 0.5), ((draw >= 0.15) & (draw < 0.25)) | (draw > 0.5)
            found = paired_items(a, b, resamples=400, seed=trial)
            covered += found.low <= 5 <= found.high
        assert 0.93 <= covered / 2000 <= 0.97

    def test_equal_and_swapped(self):
        a, b = np.random.default_rng(11).random((2, 300)) < [[0.7], [0.6]]
        assert paired_items(a, a)[:5] == (0, 0, 0, 0.5, 1)
        one, other = paired_items(a, b), paired_items(b, a)
        mirrored = (-one.value, -one.high, -one.low, 1 - one.win_rate, one.p_value)
        assert other[:5] == pytest.approx(mirrored)
        assert one.low > 0

    def test_of_few_items_nothing_is_sure(self):
        found = paired_items(np.ones(FEWEST - 1, bool), np.zeros(FEWEST - 1, bool))
        assert found.value == 100
        assert np.isnan([found.low, found.high, found.p_value]).all()
        assert not found.sure
        assert found.sentence == (
            "who is better is not known: the difference is +100.0 points, without an interval, which takes 8 items; "
            "here are 7"
        )
        assert paired_items(np.ones(FEWEST, bool), np.zeros(FEWEST, bool)).sure, "negative control"


class TestHolm:
    def test_by_hand(self):
        """Four tests: 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1 raised to the one before it."""
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
        assert holm([0.01, 0.04])[1] == 0.04, "Bonferroni's would be 0.08"

    def test_against_the_closed_test(self):
        """An adjusted p-value is the largest Bonferroni p-value of all sets of hypotheses with this one among them."""
        rng = np.random.default_rng(12)
        for m in range(1, 7):
            p = rng.random(m).round(1) ** 2  # ties, zeros
            subsets = [s for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
            closed = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(m)]
            np.testing.assert_allclose(holm(p), closed, rtol=1e-12)

    def test_monotone_capped_and_nan(self):
        p = np.sort(np.random.default_rng(13).random(50))
        adjusted = holm(p)
        assert (np.diff(adjusted) >= 0).all()
        assert adjusted.max() == 1
        assert (adjusted >= p).all()
        np.testing.assert_array_equal(holm([np.nan, 0.01, 0.02]), [np.nan, 0.02, 0.02])
        assert np.isnan(holm([np.nan, np.nan])).all()
        assert holm([]).shape == (0,)

    @pytest.mark.parametrize("p", [[1.1], [-0.1], [np.inf]])
    def test_what_is_no_probability_is_refused(self, p):
        with pytest.raises(ValueError, match="holm: expected one list of numbers in"):
            holm(p)


# --- one against many ------------------------------------------------------------------------------


def losses(variants: int = 4, seeds: int = 1, windows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    base = random.normal(4, 1, (seeds, windows))
    return base, base + 0.05 * np.arange(variants)[:, None, None] + random.normal(0, 0.1, (variants, seeds, windows))


class TestDifferences:
    def test_do_not_depend_on_company(self):
        base, others = losses(seeds=3)
        together = differences_against(base, others, resamples=2500)
        alone = [differences_against(base, other[None], resamples=2500)[0] for other in others]
        np.testing.assert_allclose(*([each[:7] for each in some] for some in (together, alone)), rtol=1e-9)
        assert together[0] != together[1]

    def test_of_losses_that_are_not_finite_are_unknown_and_disturb_nobody(self):
        base, others = losses()
        plain = differences_against(base, others, resamples=100)
        others[1, 0, 3], others[2, 0, 4], others[2, 0, 5] = math.inf, math.nan, -math.inf
        found = differences_against(base, others, resamples=100)
        np.testing.assert_allclose([found[0][:7], found[3][:7]], [plain[0][:7], plain[3][:7]])
        assert all(math.isnan(number) for each in found[1:3] for number in (each.low, each.high, each.p_value))
        assert found[1].value == math.inf
        assert plain[1].value != math.inf

    def test_give_the_p_values(self):
        base, others = losses(seeds=2)
        wanted = [each.p_value for each in differences_against(base, others)]
        assert p_values_against(base, others).tolist() == wanted
        assert wanted[0] > 0.05 > wanted[3]


# --- accuracies over tasks -------------------------------------------------------------------------


def outcomes(items: int, seeds: int = 1, share: float = 0.6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, items)) < share


def item_by_item(a, b, resamples: int = 4000, seed: int = 1):
    """Draw seeds for all tasks and items within each, one resample at a time."""
    random = np.random.default_rng(seed)
    seeds = next(iter(a.values())).shape[0]
    means = {task: [] for task in (*a, ALL)}
    for _ in range(resamples):
        rows = random.integers(seeds, size=seeds)
        each = []
        for task in a:
            columns = random.integers(a[task].shape[1], size=a[task].shape[1])
            difference = a[task].astype(float) - b[task].astype(float)
            each.append(100 * difference[np.ix_(rows, columns)].mean())
            means[task].append(each[-1])
        means[ALL].append(np.mean(each))
    return {task: np.quantile(values, [0.025, 0.975]) for task, values in means.items()}


@pytest.mark.parametrize("seeds", [1, 3])
def test_as_the_bootstrap_item_by_item(seeds):
    a = {"one": outcomes(80, seeds, 0.7), "two": outcomes(40, seeds, 0.5, 1)}
    b = {"one": outcomes(80, seeds, 0.5, 2), "two": outcomes(40, seeds, 0.5, 3)}
    found = paired_tasks(a, b)
    for task, (low, high) in item_by_item(a, b).items():
        width = high - low
        assert found[task].low == pytest.approx(low, abs=0.08 * width)
        assert found[task].high == pytest.approx(high, abs=0.08 * width)
    points = [100 * (a[task].mean() - b[task].mean()) for task in a]
    assert [found[task].value for task in a] == pytest.approx(points)
    assert found[ALL].value == pytest.approx(np.mean(points))
    assert found[ALL].high - found[ALL].low < found["two"].high - found["two"].low


def test_a_result_of_a_task_does_not_depend_on_the_others():
    a, b = {"t": outcomes(50), "u": outcomes(50, seed=5)}, {"t": outcomes(50, seed=1), "u": outcomes(50, seed=6)}
    both = paired_tasks(a, b, resamples=300)
    assert paired_tasks({"u": a["u"]}, {"u": b["u"]}, resamples=300)["u"] == both["u"]


def test_planted_difference():
    base = outcomes(400)
    worse = base.copy()
    worse[0, np.flatnonzero(base[0])[:40]] = False
    found = paired_tasks({"t": worse}, {"t": base})["t"]
    assert found.value == pytest.approx(-10)
    assert found.sure
    assert found.p_value < 0.01
    assert found.sentence.startswith("A has a lower accuracy than B by 10.0 points (")
    one = base.copy()
    one[0, 0] = ~one[0, 0]
    assert not paired_tasks({"t": one}, {"t": base})["t"].sure


def test_other_tasks_and_items_are_refused():
    with pytest.raises(ValueError, match="expected the same tasks of both models, "):
        paired_tasks({"t": outcomes(5)}, {"u": outcomes(5)})
    with pytest.raises(ValueError, match="of one item or more"):
        paired_tasks({"t": outcomes(5)}, {"t": outcomes(6)})
    with pytest.raises(ValueError, match="of one item or more"):
        paired_tasks({"t": outcomes(0)}, {"t": outcomes(0)})
    with pytest.raises(ValueError, match="resamples >= 1"):
        paired_tasks({"t": outcomes(5)}, {"t": outcomes(5)}, resamples=0)


# --- limits: what is just within holds, what is just beyond breaks ---------------------------------


def shifted(percent: float, windows: int = 12):
    b = np.random.default_rng(0).normal(4, 1, (1, windows))
    return paired_difference(b + math.log1p(percent / 100), b, resamples=200)


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
    check = check_difference("m", paired_difference(a, b, resamples=10), 1e9)
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
