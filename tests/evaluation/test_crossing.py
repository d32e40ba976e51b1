"""How far a model can be pruned: bisection and intervals on invented curves whose answers are known."""

import math

import numpy as np
import pytest

from saap_jax.contrib.frontier.page import notes, summary
from saap_jax.evaluation.crossing import Bracket, bisect, crossing, first_bracket, found_variants
from saap_jax.evaluation.resample import FEWEST

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def search(edges: dict[str, float], tolerance: float, top: float = 0.9) -> tuple[dict[str, Bracket], list[dict]]:
    """Bisect curves that hold up to their edge; return the brackets and what was asked in each round."""
    rounds = []

    def judge(asked: dict[str, float]) -> dict[str, bool]:
        rounds.append(asked)
        return {key: ratio <= edges[key] for key, ratio in asked.items()}

    starts = {key: first_bracket(RATIOS, [ratio <= edge for ratio in RATIOS], top) for key, edge in edges.items()}
    return bisect(starts, judge, tolerance), rounds


class TestBisection:
    @pytest.mark.parametrize("tolerance", [0.05, 0.005, 0.001])
    def test_finds_the_ratio_to_the_tolerance_in_log2_rounds(self, tolerance):
        edges = {"a": 0.137, "b": 0.4999, "c": 0.3}
        found, rounds = search(edges, tolerance)
        for key, edge in edges.items():
            assert found[key].low <= edge < found[key].high <= found[key].low + tolerance
        assert len(rounds) == math.ceil(math.log2(0.1 / tolerance))
        assert all(len(asked) == 3 for asked in rounds), "all advance together, one batch a round"

    def test_broken_at_the_smallest_ratio(self):
        """The unpruned model holds: the first bracket starts at 0, and the answer may be below the tolerance."""
        found, _ = search({"a": 0.021, "b": 0.0}, 0.005)
        assert found["a"].low <= 0.021 < found["a"].high
        assert found["b"].low == 0
        assert found["b"].high <= 0.005

    def test_held_on_the_whole_grid(self):
        found, rounds = search({"a": 0.95, "b": 0.71, "c": 0.2}, 0.005)
        assert found["a"] == Bracket(0.9, math.inf, 0.9, 1)
        assert rounds[0]["a"] == rounds[0]["b"] == 0.9
        assert found["b"].low <= 0.71 < found["b"].high <= found["b"].low + 0.005
        assert set(rounds[-1]) == {"b"}, "what is known is not asked again"

    def test_the_first_crossing_from_below_counts(self):
        assert first_bracket((0.3, 0.1, 0.2), (True, True, False), 0.9) == Bracket(0.1, 0.2, 0.9)
        assert first_bracket((0.1, 0.2), (False, True), 0.9) == Bracket(0.0, 0.1, 0.9)
        assert first_bracket((0.1, 0.2), (True, True), 0.9) == Bracket(0.2, math.inf, 0.9)


def test_crossing_reads_between_points():
    ratios, losses = np.array([0.0, 0.2, 0.4]), np.array([[1.0, 1.2, 2.2], [1.0, 2.0, 1.1], [1.0, 1.0, np.inf]])
    found = crossing(ratios, losses, np.array([1.7, 1.5, 1.5]))
    np.testing.assert_allclose(found, [0.3, 0.1, 0.2], atol=1e-9)
    assert crossing(ratios, losses[:1], np.array([9.0])) == 0.4, "held as far as was measured"


# --- from records --------------------------------------------------------------------------------

METRIC = "ppl@8 b"


def records(curves: dict[str, list], noise: float, windows: int = 40, percent: float = 10.0) -> tuple[dict, list[dict]]:
    """Return an invented run; a curve gives the loss of a seed at a ratio, `windows` windows scatter about it."""
    dice = np.random.default_rng(0)
    hard = dice.normal(0, 0.3, windows)  # a window is hard or easy for all
    hard -= hard.mean()
    dense = 3.0 + hard
    limit = 3.0 + math.log1p(percent / 100)
    candidates, lines = [], []
    for variant, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            edge = next((ratio for ratio in np.arange(0.001, 0.6, 0.001) if curve(ratio) > limit), 0.6)
            low = round(float(edge) - 0.002, 3)
            for ratio in (*RATIOS, low):
                scatter = dice.normal(0, noise, windows)
                losses = curve(ratio) + hard + scatter - scatter.mean()
                candidates.append(
                    {"candidate": f"{variant},{seed}@{ratio}", "variant": variant, "seed": seed, "ratio_asked": ratio,
                     "ratio_actual": ratio, "losses": {METRIC: losses.tolist()},
                     "ppl": {METRIC: float(np.exp(losses.mean()))}}
                )  # fmt: skip
            lines.append({"variant": variant, "seed": seed, "ratio": low, "breaks_at": low + 0.004, "again": []})
    run = {
        "dense": {"losses": {METRIC: dense.tolist()}, "ppl": {METRIC: math.exp(3.0)}},
        "frontier": {"metric": METRIC, "percent": percent, "limit": math.exp(limit), "ratios": list(RATIOS),
                     "resamples": 500, "lines": lines},
    }  # fmt: skip
    return run, candidates


def steep(where: float):
    """Return a curve that is flat up to about `where` and then goes up."""
    return lambda ratio: 3.0 + 0.1 * ratio + 4 * max(0.0, ratio - where) ** 2


class TestRecords:
    def test_the_furthest_comes_first_with_mean_and_spread_over_seeds(self):
        run, candidates = records({"a": [steep(0.1)] * 3, "b": [steep(0.1), steep(0.15), steep(0.2)]}, 0.0)
        found = found_variants(run, candidates)
        assert [each.variant for each in found] == ["b", "a"]
        lines = [line["ratio"] for line in run["frontier"]["lines"]]
        assert found[0].ratio.mean == pytest.approx(np.mean(lines[3:]))
        assert found[0].ratio.spread == pytest.approx(np.std(lines[3:], ddof=1))
        assert found[1].ratio.spread == 0
        assert found[0].ppl <= run["frontier"]["limit"]

    def test_intervals_hold_the_answer_and_grow_with_noise(self):
        few, many = (found_variants(*records({"a": [steep(0.1)] * 3}, noise))[0].ratio for noise in (0.01, 0.1))
        for estimate in (few, many):
            assert estimate.low <= estimate.mean <= estimate.high
        assert many.high - many.low > 2 * (few.high - few.low)

    def test_seeds_that_differ_widen_the_interval(self):
        alike, differing = (
            found_variants(*records({"a": [steep(x) for x in places]}, 0.01))[0]
            for places in ((0.15, 0.15, 0.15), (0.05, 0.15, 0.25))
        )
        assert differing.ratio.high - differing.ratio.low > 3 * (alike.ratio.high - alike.ratio.low)

    def test_who_goes_as_far_is_told_apart_or_tied(self):
        curves = {"a": [steep(0.2)], "b": [steep(0.2)], "c": [steep(0.05)]}
        first, second, third = found_variants(*records(curves, 0.02))
        assert {first.variant, second.variant} == {"a", "b"}
        assert math.isnan(first.p_value)
        assert second.tied
        assert third.p_value < 0.05
        run, rows = records(curves, 0.02)
        said = summary(run, found_variants(run, rows))
        assert said.startswith("No variant is known to go furthest within +10 % of")
        assert f"from which cannot be told apart {second.variant}" in said
        run, rows = records({"a": [steep(0.2)], "c": [steep(0.05)]}, 0.02)
        assert summary(run, found_variants(run, rows)).startswith("a goes furthest within"), "negative control"

    def test_two_seeds_that_differ_are_no_proof(self):
        """Student's p-value of two differences of which one is twice the other is 0.2; control: nearly alike."""
        for places, tied in (((0.16, 0.24), True), ((0.2, 0.2), False)):
            curves = {"a": [steep(x) for x in places], "b": [steep(0.12)] * 2}
            first, second = found_variants(*records(curves, 0.001))
            assert (first.variant, second.tied) == ("a", tied)
            assert (first.ratio.high - first.ratio.low > 0.2) == tied

    def test_articles_are_the_units_where_they_are_known(self):
        run, rows = records({"a": [steep(0.2)], "b": [steep(0.17)]}, 0.0, windows=48)
        common = np.repeat(np.random.default_rng(1).normal(0, 0.2, 8), 6)  # what an article adds
        for row in rows:
            if row["variant"] == "b":
                row["losses"][METRIC] = (np.array(row["losses"][METRIC]) + common - common.mean()).tolist()
        windows, articles = (found_variants(run | {"articles": each}, rows)
                             for each in ({}, {METRIC: np.repeat(np.arange(8), 6).tolist()}))  # fmt: skip
        assert (windows[1].windows, articles[1].windows) == (48, 8)
        assert articles[1].p_value > 2 * windows[1].p_value
        for one, other in zip(windows, articles, strict=True):
            assert one.ratio.mean == other.ratio.mean
        assert np.subtract(*articles[1].ratio[:1:-1]) > 1.5 * np.subtract(*windows[1].ratio[:1:-1])

    def test_of_few_windows_nothing_is_sure(self):
        for windows, known in ((2, False), (FEWEST - 1, False), (FEWEST, True)):
            run, rows = records({"a": [steep(0.2)], "c": [steep(0.05)]}, 0.02, windows=windows)
            found = found_variants(run, rows)
            for each in found:
                assert math.isfinite(each.ratio.low) == math.isfinite(each.ratio.high) == known
                assert math.isfinite(each.ratio.mean)
            assert math.isfinite(found[1].p_value) == known
            said = summary(run, found)
            assert ("goes furthest" in said) == known
            assert (f"{windows} windows, where it takes 8" in said) != known
            assert "another" not in summary(run, found[:1]), "there is none"
            run["frontier"] |= {"tolerance": 0.005, "rounds": 3}
            assert any("no intervals: " in note for note in notes(run, found)) != known
