"""Fidelity: the same numbers as scipy, exact at the ends, and intervals that cover."""

import math

import numpy as np
import pytest
from scipy import stats

from saap_jax.evaluation.rank_correlation import (
    bootstrap,
    bootstrap_layers,
    correlations,
)
from saap_jax.evaluation.rank_correlation import fidelity as measure_fidelity
from saap_jax.evaluation.resample import FEWEST


def scipys(a, b) -> float:
    return stats.spearmanr(a, b)[0]


def ours(a, b) -> float:
    return correlations(np.asarray(a, float), np.asarray(b, float), np.ones((1, len(a)))).item()


def pair_of(random, units: int, correlation: float, ties: bool = False) -> np.ndarray:
    """Return two normal samples of the given correlation, rounded for ties."""
    first, noise = random.standard_normal((2, units))
    second = correlation * first + math.sqrt(1 - correlation**2) * noise
    return np.round(np.stack([first, second]), 0 if ties else 12)


class TestCorrelations:
    @pytest.mark.parametrize("ties", [False, True])
    def test_equal_those_of_scipy(self, ties):
        a, b = pair_of(np.random.default_rng(0), 60, 0.4, ties)
        assert ours(a, b) == pytest.approx(scipys(a, b), abs=1e-12)
        assert abs(ours(a, b) - np.corrcoef(a, b)[0, 1]) > 1e-3  # ranks, not values

    def test_resamples_equal_repeated_units(self):
        random = np.random.default_rng(1)
        a, b = pair_of(random, 30, -0.5)
        counts = random.multinomial(30, np.full(30, 1 / 30), size=5).astype(float)
        for found, count in zip(correlations(a, b, counts), counts.astype(int), strict=True):
            assert found == pytest.approx(scipys(np.repeat(a, count), np.repeat(b, count)), abs=1e-12)

    @pytest.mark.parametrize("units", [2, 3, 7, 100, 333])
    @pytest.mark.parametrize("ties", [False, True])
    def test_equal_rankings_give_exactly_one(self, units, ties):
        a = np.append(pair_of(np.random.default_rng(units), units, 0.0, ties)[0], [5.0, -5.0])
        assert ours(a, np.exp(a)) == 1
        assert ours(a, -(a**3)) == -1
        assert ours(a, a[::-1]) < 1

    def test_infinite_scores_are_ranked(self):
        assert ours([-np.inf, 0, 1, np.inf], [1, 2, 3, 4]) == 1

    def test_constant_scores_have_none(self):
        for a, b in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1], [2]), ([], [])):
            assert np.isnan(ours(a, b))

    def test_within_layers(self):
        layers = np.repeat([0, 1, 4], [3, 4, 1])
        a = np.array([1.0, 2, 3, 10, 11, 12, 13, 0])
        b = np.array([30.0, 20, 10, 1, 2, 3, 4, 0])
        found = bootstrap_layers(a, b, layers, 50, np.random.default_rng(0))
        assert (found.value, found.size) == (0, 2), "of a layer -1, of another 1, of one none"
        assert set(np.round(found.drawn, 3)) == {-1, -0.333, 0, 0.333, 1}
        assert ours(a, b) < 0

    def test_estimators_see_the_same_resamples_of_layers(self):
        """One of which says nothing in a layer, beside one that is better wherever both say something."""
        random = np.random.default_rng(0)
        layers, truth = np.repeat(np.arange(12), 10), random.normal(size=120)
        better, worse = truth + random.normal(size=120), truth + 3 * random.normal(size=120)
        whole = bootstrap_layers(worse, truth, layers, 500, np.random.default_rng(1)).drawn
        partly = bootstrap_layers(np.where(layers == 6, 1.0, worse), truth, layers, 500, np.random.default_rng(1)).drawn
        other = bootstrap_layers(better, truth, layers, 500, np.random.default_rng(1)).drawn
        assert np.corrcoef(whole, partly)[0, 1] > 0.9
        assert abs(np.corrcoef(whole, bootstrap_layers(worse, truth, layers, 500, random).drawn)[0, 1]) < 0.2, "control"
        assert (other > partly).mean() > 0.99


class TestIntervals:
    """Of 100 simulated data sets, about 95 % of the intervals hold the true value."""

    rho = 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)

    @pytest.mark.slow
    def test_cover_the_true_correlation(self):
        random, hits = np.random.default_rng(2), 0
        for _ in range(100):
            low, high = bootstrap(*pair_of(random, 80, self.rho), 150, random).interval
            hits += low <= self.truth <= high
        assert 88 <= hits <= 99


def changes_and_scores(layers=8) -> tuple[dict, dict]:
    random = np.random.default_rng(5)
    exact = {"attention": random.standard_normal((layers, 3)), "mlp": 0.01 * random.standard_normal((layers, 40))}
    exact["mlp"][:, 20:] = np.nan  # not sampled
    scores = {
        "same": {name: np.where(np.isnan(e), 7.0, np.exp(e)) for name, e in exact.items()},
        "reversed": {name: np.where(np.isnan(e), np.nan, -e) for name, e in exact.items()},
        "constant": {name: np.ones(e.shape) for name, e in exact.items()},
        "a layer": {name: np.broadcast_to(np.arange(float(layers))[:, None], e.shape) for name, e in exact.items()},
        "noisy": {name: np.nan_to_num(e) + 0.5 * random.standard_normal(e.shape) for name, e in exact.items()},
    }
    return scores, exact


class TestFidelity:
    scores, exact = changes_and_scores()

    def found(self, **options) -> dict:
        rows = measure_fidelity(self.scores, self.exact, resamples=50, **options)
        return {(row.estimator, row.scope, row.measure): row for row in rows}

    def test_ends_are_exact(self):
        for (estimator, scope, measure), row in self.found().items():
            if estimator in ("same", "reversed"):
                value = {"same": 1.0, "reversed": -1.0}[estimator]
                none = scope == "pooled" and "layers" in measure
                np.testing.assert_array_equal(row[4:7], [np.nan if none else value] * 3)
            if estimator == "constant" or (estimator == "a layer" and "layers" in measure):
                assert np.isnan(row[4:7]).all()

    def test_values_are_those_of_the_measured_units(self):
        found = self.found()
        where = np.isfinite(self.exact["mlp"])
        a, b = self.scores["noisy"]["mlp"][where], self.exact["mlp"][where]
        assert found["noisy", "mlp", "spearman"].value == pytest.approx(scipys(a, b), abs=1e-12)
        rows = [scipys(self.scores["noisy"]["mlp"][i, :20], self.exact["mlp"][i, :20]) for i in range(8)]
        assert found["noisy", "mlp", "spearman_in_layers"].value == pytest.approx(np.mean(rows), abs=1e-12)
        pooled = [np.concatenate([x["attention"].ravel(), y]) for x, y in ((self.scores["noisy"], a), (self.exact, b))]
        assert found["noisy", "pooled", "spearman"].value == pytest.approx(scipys(*pooled), abs=1e-12)

    @pytest.mark.slow
    def test_intervals_hold_the_value_and_depend_on_the_seed_alone(self):
        found = self.found()
        row = found["noisy", "attention", "spearman"]
        assert row.low < row.value < row.high
        assert row == self.found()["noisy", "attention", "spearman"]
        assert row != self.found(seed=1)["noisy", "attention", "spearman"]

    @pytest.mark.slow
    def test_who_is_as_good_as_the_highest(self):
        """`same` agrees exactly; a copy of it is tied with it, a noisy one is not, on the units of every scope."""
        scores = {"same": self.scores["same"], "copy": self.scores["same"], "noisy": self.scores["noisy"]}
        rows = measure_fidelity(scores, self.exact, resamples=500)
        p_values = {name: {(r.scope, r.measure): r.p_value for r in rows if r.estimator == name} for name in scores}
        assert np.isnan([*p_values["same"].values()]).all(), "the highest is not compared with itself"
        for key, p in p_values["copy"].items():
            assert np.isnan(p) if key[0] == "pooled" and "layers" in key[1] else p == 1
        smallest = p_values["noisy"]["mlp", "spearman"]
        assert smallest == pytest.approx(2 * 2 / 501), "Holm: of two tests the smaller counts twice"
        many = {f"noisy {number}": self.scores["noisy"] for number in range(6)}
        rows = measure_fidelity({"same": self.scores["same"], **many}, self.exact, resamples=50)
        largest = max(row.p_value for row in rows if "noisy" in row.estimator and row.scope == "mlp")
        assert largest < 0.05, "with 50 resamples no p-value is small enough for six tests: there are more"

    @pytest.mark.slow
    def test_of_few_units_layers_or_windows_there_is_no_interval(self):
        scores, exact = changes_and_scores(layers=FEWEST - 1)
        exact["attention"][2:] = np.nan  # six units are left
        found = {(r.estimator, r.scope, r.measure): r for r in measure_fidelity(scores, exact, resamples=50)}
        for scope, measure, known in (
            ("attention", "spearman", False), ("mlp", "spearman", True), ("mlp", "spearman_in_layers", False),
        ):  # fmt: skip
            row = found["noisy", scope, measure]
            assert math.isfinite(row.value)
            assert math.isfinite(row.low) == math.isfinite(row.p_value) == known
        for windows, known in ((FEWEST - 1, False), (FEWEST, True)):
            rows = measure_fidelity(scores, exact, windows=windows, resamples=50)
            assert any(math.isfinite(row.low) for row in rows) == known

    def test_refuses(self):
        holes = {name: values.copy() for name, values in self.scores["noisy"].items()}
        holes["mlp"][2, 5] = np.nan
        with pytest.raises(ValueError, match="scores of e for mlp .* and none NaN where a change"):
            measure_fidelity({"e": holes}, self.exact)
        with pytest.raises(ValueError, match=r"scores of e for attention of \(8, 3\) .*, got \(7, 3\)"):
            measure_fidelity({"e": {name: values[1:] for name, values in holes.items()}}, self.exact)
