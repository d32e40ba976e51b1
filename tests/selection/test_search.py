"""The search: brute force and an exact knapsack beside it, the rules it must obey on random problems, small cases."""

import dataclasses
import itertools
import math
import re

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from saap_jax.config.search import PROTECTED, PerStructure, SearchConfig, SharePerStructure
from saap_jax.selection import budget
from saap_jax.selection import search as search_module
from saap_jax.selection.search import search, skipped_layers
from scipy.optimize import minimize

from saap_jax.types import STRUCTURES

NO_FLOOR = PerStructure(attention=0, mlp=0)
FREE = SearchConfig(allocation="global", min_keep=NO_FLOOR)
MLP_ONLY = dataclasses.replace(FREE, max_ratio=SharePerStructure(attention=0.0))


class Problem:
    """Random scores and costs of a small model; a few units are missing."""

    def __init__(self, seed: int, *, layers=3, heads=3, channels=6, costs=(7, 2), ties=False, missing=True):
        rng = np.random.default_rng(seed)
        shapes = {"attention": (layers, heads), "mlp": (layers, channels)}
        draw = (lambda s: rng.integers(0, 4, s).astype(float)) if ties else (lambda s: rng.lognormal(0, 1, s))
        self.scores = {name: draw(shape) for name, shape in shapes.items()}
        self.existing = {name: rng.random(shape) > 0.15 * missing for name, shape in shapes.items()}
        self.costs = {n: np.full(layers, c, np.int64) for n, c in zip(STRUCTURES, costs, strict=True)}
        self.stability = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def search(self, ratio: float, config: SearchConfig):
        return search(self.scores, self.costs, self.existing, ratio, config, self.stability)

    @property
    def prunable(self) -> int:
        return sum(int((self.existing[n].sum(1) * self.costs[n]).sum()) for n in STRUCTURES)

    def cost(self, keep) -> int:
        return sum(int(((self.existing[n] & ~keep[n]).sum(1) * self.costs[n]).sum()) for n in STRUCTURES)

    def loss(self, keep) -> float:
        return float(sum(self.scores[n][self.existing[n] & ~keep[n]].sum() for n in STRUCTURES))


def allowed(problem: Problem, keep, config: SearchConfig) -> bool:
    """Say whether a keep-set obeys floors, caps, alignment and the layers left alone."""
    layers = len(keep["mlp"])
    alone = {layer % layers for layer in config.skip_layers}
    for name in STRUCTURES:
        if (keep[name] & ~problem.existing[name]).any():
            return False
        for layer in range(layers):
            units, kept = int(problem.existing[name][layer].sum()), int(keep[name][layer].sum())
            if kept == units:
                continue
            if layer in alone or kept < getattr(config.min_keep, name):
                return False
            if units - kept > units * getattr(config.max_ratio, name) + 1e-9:
                return False
            if kept % (units if config.depth else getattr(config.multiple_of, name)):
                return False
    return True


def last_blocks(problem: Problem, keep, config: SearchConfig):
    """Yield (structure, layer, parameters) of the block that was last removed from each layer."""
    for name in STRUCTURES:
        for layer, kept in enumerate(keep[name].sum(1)):
            units, multiple = int(problem.existing[name][layer].sum()), getattr(config.multiple_of, name)
            gone = units - int(kept)
            if gone:
                first = units % multiple or multiple
                block = gone if config.depth or gone == first else multiple
                yield name, layer, block * int(problem.costs[name][layer])


def brute_force(problem: Problem, target: int, config: SearchConfig) -> float:
    """Return the lowest sum of scores that any allowed keep-set removes with at least `target` parameters."""
    where = [(n, *map(int, at)) for n in STRUCTURES for at in np.argwhere(problem.existing[n])]
    where = [(n, layer, unit) for n, layer, unit in where if getattr(config.max_ratio, n) > 0]
    best = np.inf
    for gone in itertools.product([False, True], repeat=len(where)):
        removed = [at for at, out in zip(where, gone, strict=True) if out]
        if sum(int(problem.costs[n][layer]) for n, layer, _ in removed) < target:
            continue
        loss = sum(problem.scores[n][layer, unit] for n, layer, unit in removed)
        if loss < best:
            keep = {n: e.copy() for n, e in problem.existing.items()}
            for name, layer, unit in removed:
                keep[name][layer, unit] = False
            if allowed(problem, keep, config):
                best = loss
    return best


@st.composite
def fields(draw) -> dict:
    """Draw the fields of a configuration: plain values, for `configured`."""
    allocation = draw(st.sampled_from(["uniform", "uniform_floor", "log", "softmax", *["global", "adaptive"] * 2]))
    ranks = allocation in ("global", "adaptive")
    depth = ranks and draw(st.sampled_from([False, False, True]))
    share = draw(st.sampled_from([None, None, 0.0, 0.3, 1.0]))
    pair = lambda values: draw(st.tuples(st.sampled_from(values), st.sampled_from(values)))  # noqa: E731
    return {
        "allocation": allocation,
        "rank_by": draw(st.sampled_from(["score", "score_per_parameter"])),
        "normalize": draw(st.sampled_from(["none", "structure_mean"])),
        "stability_weight": draw(st.sampled_from([-0.5, 0.0, 0.5])),
        "attention_share": share,
        "attention_from": 0.0 if share is None else draw(st.sampled_from([0.0, 0.0, 0.2])),
        "min_keep": (0, 0) if depth else pair([0, 1, 2]),
        "max_ratio": (1.0, 1.0) if depth else pair([1.0, 0.7, 0.5]),
        "skip_layers": draw(st.sampled_from([(), (), (0,), (-1,), (0, -1)])),
        "multiple_of": pair([1, 2, 3]),
        "depth": depth,
        "solver": draw(st.sampled_from(["greedy", "exact"])) if ranks else "greedy",
    }


def configured(fields: dict) -> SearchConfig:
    kinds = {"min_keep": PerStructure, "max_ratio": SharePerStructure, "multiple_of": PerStructure}
    pairs = {k: kind(**dict(zip(STRUCTURES, fields[k], strict=True))) for k, kind in kinds.items()}
    return SearchConfig(**{**fields, **pairs})


def largest_ratio(problem: Problem, config: SearchConfig) -> float:
    """Return the largest possible ratio that the refusal of an impossible one names; 1 where all can be removed."""
    try:
        problem.search(1 - 1e-9, config)
    except ValueError as refused:
        named = re.search(r"largest possible ratio is (\d\.\d{4}) under", str(refused))
        assert named is not None
        return float(named[1])
    return 1.0


class TestOptimum:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(
        "limits",
        [
            {},
            {"min_keep": PerStructure(attention=0, mlp=2)},
            {"max_ratio": SharePerStructure(attention=0.0, mlp=0.5)},
            {"skip_layers": (-1,)},
            {"multiple_of": PerStructure(attention=1, mlp=2)},
        ],
    )
    def test_equal_costs_remove_the_least_score_of_all_keep_sets(self, seed, limits):
        problem = Problem(seed, layers=2, heads=1, channels=4, missing=False)
        config = dataclasses.replace(MLP_ONLY, **limits)
        for ratio in (0.1, 0.25):
            got = problem.search(ratio, config)
            assert allowed(problem, got.keep, config)
            want = brute_force(problem, int(np.ceil(ratio * problem.prunable)), config)
            assert problem.loss(got.keep) == pytest.approx(want, rel=1e-12)

    def test_another_ranking_is_not_the_optimum(self):
        problem = Problem(0, layers=2, heads=1, channels=4, missing=False)
        got = problem.search(0.25, MLP_ONLY)
        backwards = search({n: -s for n, s in problem.scores.items()}, problem.costs, problem.existing, 0.25, MLP_ONLY)
        assert problem.loss(backwards.keep) > 1.5 * problem.loss(got.keep)

    @given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.booleans(), st.sampled_from([1, 2]))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_two_costs_stay_within_one_block_and_exact_is_the_optimum(self, seed, ratio, ties, multiple):
        problem = Problem(seed, layers=2, heads=2, channels=3, costs=(7, 2), ties=ties)
        config = dataclasses.replace(FREE, multiple_of=PerStructure(attention=1, mlp=multiple))
        target = int(np.ceil(ratio * problem.prunable - 1e-9))
        assume(target > 0)
        best = brute_force(problem, target, config)
        exact = problem.search(ratio, dataclasses.replace(config, solver="exact"))
        assert problem.loss(exact.keep) == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert allowed(problem, exact.keep, config)
        assert exact.removed >= target
        greedy = problem.loss(problem.search(ratio, config).keep)
        assert best - 1e-9 <= greedy <= best + self.crossing_block(problem, target, multiple) + 1e-9

    def crossing_block(self, problem: Problem, target: int, multiple: int) -> float:
        """Return the score of the block at which the parameters of the blocks, lowest density first, reach `target`."""
        blocks = []
        for name in STRUCTURES:
            for layer, exists in enumerate(problem.existing[name]):
                values, step = np.sort(problem.scores[name][layer][exists]), multiple if name == "mlp" else 1
                ends = list(range(len(values) % step or step, len(values) + 1, step))
                for start, end in zip([0, *ends], ends, strict=False):
                    cost = (end - start) * int(problem.costs[name][layer])
                    loss = values[start:end].sum()
                    blocks.append((loss / cost, cost, loss))
        removed = 0
        for _, cost, loss in sorted(blocks):
            removed += cost
            if removed >= target:
                return loss
        raise AssertionError("not reached")

    def test_greedy_is_not_the_optimum_with_two_costs(self):
        scores = {"attention": np.array([[3.0]]), "mlp": np.array([[1.1, 1.1, 9.0]])}
        costs = {"attention": np.array([3]), "mlp": np.array([1])}
        existing = {n: np.ones(s.shape, bool) for n, s in scores.items()}
        greedy = search(scores, costs, existing, 2 / 6, FREE)
        exact = search(scores, costs, existing, 2 / 6, dataclasses.replace(FREE, solver="exact"))
        assert greedy.removed == 3
        assert not greedy.keep["attention"].any()
        assert exact.removed == 2
        assert exact.keep["mlp"].tolist() == [[False, False, True]]

    def test_exact_shifts_negative_scores_and_removes_no_more_than_asked(self):
        problem = Problem(0, heads=1, missing=False)
        problem.scores = {n: s - 10 for n, s in problem.scores.items()}
        config = dataclasses.replace(MLP_ONLY, solver="exact")
        for got, want in zip(problem.search(0.2, config), problem.search(0.2, MLP_ONLY), strict=True):
            np.testing.assert_equal(got, want)

    def test_exact_refuses_large_problems(self, monkeypatch):
        monkeypatch.setattr(budget, "EXACT_LIMIT", 100)
        with pytest.raises(ValueError, match=r"at most 100 steps, got [\d,]+ .27 blocks times \d+ sizes"):
            Problem(0, missing=False).search(0.5, dataclasses.replace(FREE, solver="exact"))


class TestRules:
    @pytest.mark.slow
    @given(st.integers(0, 10_000), fields(), st.floats(0, 0.95), st.booleans())
    @settings(max_examples=150, deadline=None, derandomize=True)
    def test_obeys_all_limits_and_meets_the_budget_by_less_than_a_block(self, seed, fields, ratio, ties):
        problem, config = Problem(seed, ties=ties), configured(fields)
        try:
            got = problem.search(ratio, config)
        except ValueError as refused:
            assert "largest possible ratio" in str(refused)  # noqa: PT017
            assert ratio > largest_ratio(problem, config)
            return
        assert allowed(problem, got.keep, config)
        assert got.removed == problem.cost(got.keep)
        assert got.asked == ratio
        assert got.actual == pytest.approx(got.removed / problem.prunable)
        assert got.removed >= ratio * problem.prunable - 1e-6
        for _, _, parameters in last_blocks(problem, got.keep, config):
            assert got.removed - parameters < ratio * problem.prunable

    @pytest.mark.slow
    @given(st.integers(0, 10_000), fields())
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_the_largest_ratio_is_possible_and_the_next_is_not(self, seed, fields):
        problem, config = Problem(seed), configured(fields)
        largest = largest_ratio(problem, config)
        assert search_module.largest_ratio(problem.costs, problem.existing, config) == min(largest, 0.9999)
        assume(largest < 1)
        assert problem.search(largest, config).actual >= largest - 1e-9
        with pytest.raises(ValueError, match="cannot be removed"):
            problem.search(largest + 1e-4, config)

    @pytest.mark.slow
    @given(st.integers(0, 10_000), fields(), st.floats(0, 0.9))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_one_budget_removes_the_same_when_asked_for_what_it_removed(self, seed, fields, ratio):
        free = {"attention_share": None, "attention_from": 0.0, "solver": "greedy"}
        problem, config = Problem(seed), configured({**fields, **free})
        assume(config.allocation in ("global", "adaptive") and ratio <= largest_ratio(problem, config))
        first = problem.search(ratio, config)
        assume(first.actual < 1)
        assert problem.search(first.actual, config).removed == first.removed

    @pytest.mark.parametrize("units", [7, 49, 100])
    def test_the_ratio_of_whole_units_asks_for_just_these(self, units):
        # 0.07 * 100 is a little over 7, and 1 / 49 * 49 a little under 1
        scores = {"attention": np.ones((1, 1)), "mlp": np.arange(1.0, units)[None]}
        existing = {n: np.ones(s.shape, bool) for n, s in scores.items()}
        costs = {n: np.array([1]) for n in STRUCTURES}
        for gone in range(units):
            assert search(scores, costs, existing, gone / units, FREE).removed == gone

    def test_equal_scores_leave_aligned_blocks_in_order(self):
        problem = Problem(0, layers=1, heads=1, channels=7, costs=(1, 1), missing=False)
        problem.scores = {"attention": np.ones((1, 1)), "mlp": np.full((1, 7), 0.1)}
        config = dataclasses.replace(FREE, multiple_of=PerStructure(mlp=4))
        assert [problem.search(r, config).removed for r in (0.1, 0.5)] == [3, 7]
        assert problem.cost(problem.search(0.1, config).keep) == 3

    @pytest.mark.slow
    @given(st.integers(0, 10_000), fields(), st.floats(0, 0.9))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_keep_sets_permute_with_the_units(self, seed, fields, ratio):
        problem, moved, config = Problem(seed), Problem(seed), configured(fields)
        assume(ratio <= largest_ratio(problem, config))
        rng = np.random.default_rng(seed)
        orders = {n: np.argsort(rng.random(s.shape), axis=1) for n, s in problem.scores.items()}
        for tree in ("scores", "existing", "stability"):
            setattr(moved, tree, {n: np.take_along_axis(v, orders[n], 1) for n, v in getattr(problem, tree).items()})
        keep, permuted = problem.search(ratio, config).keep, moved.search(ratio, config).keep
        for name in STRUCTURES:
            np.testing.assert_array_equal(permuted[name], np.take_along_axis(keep[name], orders[name], 1))

    @pytest.mark.slow
    @given(st.integers(0, 10_000), fields(), st.floats(0, 0.9), st.sampled_from([2.0**-40, 2.0**40]))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_the_scale_of_the_scores_does_not_matter(self, seed, fields, ratio, scale):
        problem, config = Problem(seed), configured(fields)
        assume(ratio <= largest_ratio(problem, config))
        keep = problem.search(ratio, config).keep
        problem.scores = {n: s * scale for n, s in problem.scores.items()}
        scaled = problem.search(ratio, dataclasses.replace(config, softmax_temperature=0.1 * scale)).keep
        assert all((keep[n] == scaled[n]).all() for n in STRUCTURES)

    @given(st.integers(0, 10_000), st.sampled_from(["global", "adaptive"]), st.booleans())
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_keep_sets_are_nested_where_blocks_cost_the_same(self, seed, allocation, ties):
        problem = Problem(seed, costs=(2, 2), ties=ties)
        keeps = [problem.search(r, dataclasses.replace(FREE, allocation=allocation)).keep for r in (0.2, 0.4, 0.6, 0.8)]
        for more, less in itertools.pairwise(keeps):
            assert all((more[n] | ~less[n]).all() for n in STRUCTURES)

    def test_keep_sets_are_not_nested_where_a_dear_block_replaces_cheap_ones(self):
        scores = {"attention": np.array([[5.0]]), "mlp": np.array([[1.0, 1.0]])}
        costs = {"attention": np.array([3]), "mlp": np.array([1])}
        existing = {n: np.ones(s.shape, bool) for n, s in scores.items()}
        two, three = (search(scores, costs, existing, n / 5, FREE).keep for n in (2, 3))
        assert two["attention"].all()
        assert not two["mlp"].any()
        assert three["mlp"].all()
        assert not three["attention"].any()


class TestTies:
    def test_cheaper_then_attention_then_lower_layer_then_lower_index(self):
        config = dataclasses.replace(FREE, rank_by="score")
        scores = {"attention": np.ones((2, 2)), "mlp": np.ones((2, 2))}
        existing = {n: np.ones((2, 2), bool) for n in STRUCTURES}
        dear = {"attention": np.array([3, 3]), "mlp": np.array([1, 1])}
        even = {"attention": np.array([1, 1]), "mlp": np.array([1, 1])}
        assert search(scores, dear, existing, 2 / 16, config).keep["mlp"].tolist() == [[False, False], [True, True]]
        one = search(scores, even, existing, 1 / 8, config).keep
        assert one["attention"].tolist() == [[False, True], [True, True]]
        five = search(scores, even, existing, 5 / 8, config).keep
        assert not five["attention"].any()
        assert five["mlp"].tolist() == [[False, True], [True, True]]


class TestUniform:
    def dense(self, layers=4, heads=4, channels=24, costs=(6, 1)) -> Problem:
        return Problem(0, layers=layers, heads=heads, channels=channels, costs=costs, missing=False)

    @pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
    def test_every_layer_loses_the_same_share_of_both_structures(self, ratio):
        keep = self.dense().search(ratio, SearchConfig()).keep
        assert len(set(keep["attention"].sum(1))) == 1
        assert len(set(keep["mlp"].sum(1))) == 1
        if ratio != 0.125:
            assert keep["attention"].sum(1)[0] == 4 * (1 - ratio)
            assert keep["mlp"].sum(1)[0] == 24 * (1 - ratio)

    def test_the_least_important_units_of_each_layer_go(self):
        problem = self.dense()
        keep = problem.search(0.5, SearchConfig()).keep
        for name in STRUCTURES:
            kept = np.where(keep[name], problem.scores[name], np.inf).min(1)
            assert (np.where(keep[name], -np.inf, problem.scores[name]).max(1) < kept).all()

    def test_layers_left_alone_lose_nothing_and_the_others_their_part(self):
        keep = self.dense().search(0.25, SearchConfig(skip_layers=(0, -1))).keep
        for name in STRUCTURES:
            assert keep[name][[0, 3]].all()
            assert keep[name][[1, 2]].sum() == keep[name][[1, 2]].size / 2

    def test_what_is_left_over_goes_to_the_first_layers(self):
        problem = self.dense()
        keep = problem.search(6 / problem.prunable, SearchConfig()).keep
        assert keep["mlp"].sum(1).tolist() == [22, 22, 23, 23]
        coarse = SearchConfig(multiple_of=PerStructure(mlp=8), max_ratio=SharePerStructure(attention=0.0))
        assert problem.search(16 / problem.prunable, coarse).keep["mlp"].sum(1).tolist() == [16, 16, 24, 24]

    @given(st.integers(0, 10_000), st.floats(0, 0.6), st.sampled_from([None, 0.4]))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_budgets_are_met_within_a_block(self, seed, ratio, share):
        problem, config = Problem(seed, channels=12), SearchConfig(attention_share=share, min_keep=NO_FLOOR)
        assume(ratio <= largest_ratio(problem, config))
        keep = problem.search(ratio, config).keep
        size = {n: problem.existing[n].sum(1) * problem.costs[n] for n in STRUCTURES}
        gone = {n: (problem.existing[n] & ~keep[n]).sum(1) * problem.costs[n] for n in STRUCTURES}
        target = ratio * problem.prunable
        if share is None:
            budgets = [(sum(gone.values()), target * sum(size.values()) / problem.prunable)]
        else:
            parts = {"attention": share, "mlp": 1 - share}
            budgets = [(gone[n], target * parts[n] * size[n] / size[n].sum()) for n in STRUCTURES]
        for got, want in budgets:
            assert (np.abs(got - want) <= 7 + 1).all()

    def test_a_layer_that_cannot_give_its_share_is_refused(self):
        problem = self.dense()
        problem.existing["mlp"][2, 1:] = problem.existing["attention"][2, 1:] = False
        with pytest.raises(ValueError, match=r"largest possible ratio is 0\.0000"):
            problem.search(0.25, SearchConfig())
        assert problem.search(0.25, SearchConfig(skip_layers=(2,))).actual >= 0.25

    def test_a_layer_without_units_does_not_count(self):
        problem = self.dense()
        problem.existing["mlp"][2] = problem.existing["attention"][2] = False
        assert problem.search(0.25, SearchConfig()).actual == pytest.approx(0.25)


class TestRankings:
    @pytest.mark.parametrize("weight", [-0.5, 0.5])
    def test_adaptive_removes_the_lowest_log_score_plus_weighted_stability(self, weight):
        problem = Problem(3, costs=(2, 2), missing=False)
        config = dataclasses.replace(FREE, allocation="adaptive", stability_weight=weight)
        keep = problem.search(1 / 3, config).keep
        ranked = np.concatenate(
            [(np.log(problem.scores[n]) + weight * problem.stability[n]).ravel() for n in STRUCTURES]
        )
        want = ranked > np.sort(ranked)[8]
        np.testing.assert_array_equal(np.concatenate([keep[n].ravel() for n in STRUCTURES]), want)
        plain = problem.search(1 / 3, FREE).keep
        assert any((plain[n] != keep[n]).any() for n in STRUCTURES)

    @pytest.mark.parametrize("rank_by", ["score", "score_per_parameter"])
    def test_adaptive_is_the_global_ranking_of_the_exponential(self, rank_by):
        problem, other = Problem(3), Problem(3)
        config = dataclasses.replace(FREE, rank_by=rank_by)
        other.scores = {n: s * np.exp(0.5 * problem.stability[n]) for n, s in problem.scores.items()}
        got = problem.search(0.4, dataclasses.replace(config, allocation="adaptive", stability_weight=0.5)).keep
        want = other.search(0.4, config).keep
        assert all((got[n] == want[n]).all() for n in STRUCTURES)

    @pytest.mark.parametrize(("weight", "kept"), [(1.0, 1), (-1.0, 0)])
    def test_the_sign_of_the_weight_keeps_or_removes_the_unstable_unit(self, weight, kept):
        scores = {"attention": np.ones((1, 1)), "mlp": np.ones((1, 2))}
        costs = {n: np.array([1]) for n in STRUCTURES}
        existing = {n: np.ones(s.shape, bool) for n, s in scores.items()}
        stability = {"attention": np.zeros((1, 1)), "mlp": np.array([[-1.0, 1.0]])}
        config = dataclasses.replace(MLP_ONLY, allocation="adaptive", stability_weight=weight)
        keep = search(scores, costs, existing, 1 / 3, config, stability).keep["mlp"]
        assert np.flatnonzero(keep[0]).tolist() == [kept]

    @given(st.integers(0, 10_000), st.sampled_from([1, 2]))
    @settings(max_examples=20, deadline=None, derandomize=True)
    def test_weight_zero_is_the_global_ranking(self, seed, multiple):
        problem = Problem(seed)
        config = dataclasses.replace(FREE, multiple_of=PerStructure(attention=1, mlp=multiple))
        adaptive = dataclasses.replace(config, allocation="adaptive", stability_weight=0.0)
        keep = problem.search(0.4, config).keep
        same = search(problem.scores, problem.costs, problem.existing, 0.4, adaptive).keep
        assert all((keep[n] == same[n]).all() for n in STRUCTURES)

    def test_adaptive_needs_the_indicator_and_scores_of_at_least_zero(self):
        problem, config = Problem(0, missing=False), dataclasses.replace(FREE, allocation="adaptive")
        with pytest.raises(ValueError, match="expects a stability indicator, got none"):
            search(problem.scores, problem.costs, problem.existing, 0.2, config)
        problem.scores["mlp"][1, 2] = -1
        with pytest.raises(ValueError, match="got -1 for mlp unit 2 in layer 1"):
            problem.search(0.2, config)
        assert problem.search(0.2, FREE).actual >= 0.2

    def test_rank_by_decides_whether_dear_units_seem_worth_more(self):
        scores = {"attention": np.array([[4.0]]), "mlp": np.array([[2.0, 2.0]])}
        costs = {"attention": np.array([4]), "mlp": np.array([1])}
        existing = {n: np.ones(s.shape, bool) for n, s in scores.items()}
        for rank_by, attention in (("score", True), ("score_per_parameter", False)):
            config = dataclasses.replace(FREE, rank_by=rank_by)
            assert search(scores, costs, existing, 1 / 6, config).keep["attention"].all() == attention

    def test_structure_mean_makes_structures_comparable(self):
        problem = Problem(0, missing=False)
        config = dataclasses.replace(FREE, rank_by="score", normalize="structure_mean")
        keep = problem.search(0.4, config).keep
        problem.scores["mlp"] = problem.scores["mlp"] * 1024
        assert all((problem.search(0.4, config).keep[n] == keep[n]).all() for n in STRUCTURES)
        plain = problem.search(0.4, dataclasses.replace(config, normalize="none")).keep
        assert (plain["attention"] != keep["attention"]).any()
        problem.scores["mlp"] = np.zeros_like(problem.scores["mlp"])
        with pytest.raises(ValueError, match="expects scores of mlp with a mean above 0, got 0"):
            problem.search(0.4, config)

    @pytest.mark.parametrize("seed", range(5))
    def test_flap_as_a_configuration(self, seed):
        problem = Problem(seed, layers=4, heads=4, channels=20, costs=(7, 2), missing=False)
        metrics, weights = [], []
        for name in STRUCTURES:
            s = problem.scores[name]
            metrics.append(((s - s.mean(1, keepdims=True)) / s.std(1, ddof=1, keepdims=True)).ravel())
            weights.append(np.full(s.size, int(problem.costs[name][0])))
        metric, weight = np.concatenate(metrics), np.concatenate(weights)
        removed = np.cumsum(weight[np.argsort(metric)])
        ratio = removed[len(removed) // 3] / removed[-1]  # where their threshold meets the budget exactly
        want = metric > np.sort(metric)[len(removed) // 3]
        flap = dataclasses.replace(FREE, rank_by="score", normalize="layer_zscore")
        keep = problem.search(float(ratio), flap).keep
        np.testing.assert_array_equal(np.concatenate([keep[n].ravel() for n in STRUCTURES]), want)
        other = problem.search(float(ratio), dataclasses.replace(flap, normalize="none")).keep
        assert (np.concatenate([other[n].ravel() for n in STRUCTURES]) != want).any()

    def test_a_single_unit_a_layer_leaves_all_to_the_mlp(self):
        """As `saap prune` meets a model with one KV head; with two of them the share is met."""
        for heads, gone in ((1, 0), (2, 2)):
            existing = {"attention": np.ones((4, heads), bool), "mlp": np.ones((4, 10), bool)}
            costs = {"attention": np.full(4, 5), "mlp": np.full(4, 1)}
            scores = {name: np.arange(units.size, dtype=float).reshape(units.shape) for name, units in existing.items()}
            for config in (SearchConfig(attention_share=0.5), SearchConfig(attention_share=0.5, max_segments=2)):
                chosen = search(scores, costs, existing, 0.25, config)
                assert (int((~chosen.keep["attention"]).sum()) > 0) == (gone > 0)
                assert chosen.actual >= 0.25
            assert search_module.largest_ratio(costs, existing, SearchConfig(attention_share=0.5)) > 0.25

    @given(
        st.integers(0, 10_000),
        st.sampled_from([0.0, 0.25, 0.5]),
        st.sampled_from([0.0, 0.1, 0.4]),
        st.sampled_from(["score", "score_per_parameter"]),
    )
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_attention_share_is_met_within_a_block(self, seed, share, start, rank_by):
        """Of what goes beyond `attention_from`, where all up to that comes from the MLP."""
        problem = Problem(seed, layers=4, heads=4, channels=12)
        config = dataclasses.replace(FREE, attention_share=share, attention_from=start, rank_by=rank_by)
        assume(largest_ratio(problem, config) >= 0.3)
        got = problem.search(0.3, config)
        attention = int((problem.existing["attention"] & ~got.keep["attention"]).sum()) * 7
        assert abs(attention - share * max(0.3 - start, 0) * problem.prunable) <= 7


class TestDepth:
    config = dataclasses.replace(FREE, depth=True)

    def test_removes_the_sub_blocks_of_least_mean_score(self):
        scores = {"attention": np.array([[5.0, 5.0], [1.0, 2.0]]), "mlp": np.array([[4.0, 0.0], [9.0, 9.0]])}
        costs = {"attention": np.array([2, 2]), "mlp": np.array([2, 2])}
        existing = {n: np.ones((2, 2), bool) for n in STRUCTURES}
        one = search(scores, costs, existing, 0.25, self.config).keep
        assert (one["attention"].tolist(), one["mlp"].all()) == ([[True, True], [False, False]], True)
        two = search(scores, costs, existing, 0.5, self.config).keep
        assert not two["attention"][1].any()
        assert not two["mlp"][0].any()
        assert two["attention"][0].all()
        # without depth the dead channel goes first
        assert search(scores, costs, existing, 0.125, FREE).keep["mlp"].tolist() == [[True, False], [True, True]]

    def test_a_structure_with_a_floor_keeps_all_its_sub_blocks(self):
        problem = Problem(0, missing=False)
        config = dataclasses.replace(self.config, min_keep=PerStructure(attention=0, mlp=1))
        keep = problem.search(0.3, config).keep
        assert keep["mlp"].all()
        assert not keep["attention"].all()


class TestRefusals:
    @pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan"), float("inf")])
    def test_ratios(self, ratio):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
            Problem(0).search(ratio, FREE)

    def test_ratio_zero_removes_nothing(self):
        for config in (SearchConfig(), FREE, SearchConfig(skip_layers=(0, 1, 2))):
            got = Problem(0).search(0.0, config)
            assert got.removed == 0
            assert all((got.keep[n] == Problem(0).existing[n]).all() for n in STRUCTURES)

    def test_structures_without_scores_and_other_shapes(self):
        problem = Problem(0)
        del problem.scores["mlp"]
        with pytest.raises(ValueError, match="structure mlp has no scores"):
            problem.search(0.2, FREE)
        problem.scores["mlp"] = np.ones((3, 5))
        with pytest.raises(ValueError, match=r"expected mlp scores of \(3, 6\), got \(3, 5\)"):
            problem.search(0.2, FREE)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_scores_that_are_not_finite_only_where_there_are_units(self, value):
        problem = Problem(0)
        problem.existing["mlp"][1, 2] = False
        problem.scores["mlp"][1, 2] = np.nan
        before = problem.search(0.2, FREE).keep
        assert not before["mlp"][1, 2]
        problem.existing["mlp"][1, 3] = True
        problem.scores["mlp"][1, 3] = value
        with pytest.raises(ValueError, match="scores of mlp unit 3 in layer 1 are not finite"):
            problem.search(0.2, FREE)

    def test_layers_left_alone(self):
        with pytest.raises(ValueError, match=r"expected layers in \[-3, 3\) of this model, got 3"):
            Problem(0).search(0.2, dataclasses.replace(FREE, skip_layers=(3,)))
        with pytest.raises(ValueError, match=r"largest possible ratio is 0\.0000"):
            Problem(0).search(0.2, SearchConfig(skip_layers=(0, 1, 2)))

    def test_a_share_of_the_layers_left_alone(self):
        """By hand, at depths of models that there are; of 32 layers what LLM-Pruner says by number."""
        for depth, first, last in ((32, 4, 2), (30, 4, 2), (18, 2, 1), (12, 2, 1), (3, 0, 0)):
            by_hand = np.isin(np.arange(depth), [*range(first), *range(depth - last, depth)])
            np.testing.assert_array_equal(skipped_layers(PROTECTED, depth), by_hand)
        np.testing.assert_array_equal(skipped_layers((0, -1), 18), skipped_layers((0.06, -0.06), 18))
        np.testing.assert_array_equal(skipped_layers((0.5, 17), 18).nonzero()[0], [*range(9), 17])
        for wrong in (1.5, -1.2, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"skip_layers: expected numbers of layers, or shares .* got {wrong}"):
                SearchConfig(skip_layers=(wrong,))

    def test_a_model_without_units(self):
        problem = Problem(0)
        problem.existing = {n: np.zeros_like(e) for n, e in problem.existing.items()}
        assert problem.search(0.5, SearchConfig()).removed == 0

    def test_takes_jax_arrays(self):
        problem = Problem(0)
        want = problem.search(0.3, FREE).keep
        problem.scores = {n: jnp.asarray(s, jnp.float32) for n, s in problem.scores.items()}
        got = problem.search(0.3, FREE).keep
        assert all((got[n] == want[n]).all() for n in STRUCTURES)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"allocation": "x"},
                "search.allocation: expected one of uniform, uniform_floor, log, softmax, global, adaptive, got 'x'",
            ),
            ({"stability_weight": float("nan")}, "stability_weight: expected a finite number, got nan"),
            ({"softmax_temperature": 0.0}, "search.softmax_temperature: expected a number above 0, got 0"),
            ({"attention_share": 1.5}, r"attention_share: expected a number in \[0, 1\], got 1.5"),
            ({"attention_from": 0.2}, "attention_from: expected search.attention_share beside it, got 0.2 alone"),
            ({"multiple_of": NO_FLOOR}, "multiple_of: expected numbers of at least 1"),
            ({"depth": True}, "depth needs a ranking"),
            ({"solver": "exact"}, "solver 'exact' needs a ranking"),
            ({"depth": True, "allocation": "global"}, "expected a structure with min_keep 0 and max_ratio 1"),
            ({"normalize": "layer_zscore", "allocation": "global"}, "for allocation 'global' and rank_by 'score' only"),
        ],
    )
    def test_configurations(self, monkeypatch, fields, message):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checks at run time
        with pytest.raises(ValueError, match=message):
            SearchConfig(**fields)
        with pytest.raises(ValueError, match=r"mlp: expected a number in \[0, 1\], got 2"):
            SharePerStructure(mlp=2)


class TestGone:
    """Units that an earlier step removed."""

    CONFIGS = (
        FREE,
        dataclasses.replace(FREE, rank_by="score"),
        dataclasses.replace(FREE, rank_by="score", normalize="layer_zscore"),
        dataclasses.replace(FREE, allocation="adaptive", stability_weight=0.5),
        dataclasses.replace(FREE, attention_share=0.3),
        dataclasses.replace(FREE, attention_share=0.5, attention_from=0.2),
        dataclasses.replace(FREE, solver="exact"),
        SearchConfig(min_keep=NO_FLOOR),
    )

    @given(seed=st.integers(0, 1000), config=st.sampled_from(CONFIGS))
    @settings(max_examples=60, deadline=None)
    def test_they_go_first_and_their_scores_are_not_read(self, seed, config):
        problem = Problem(seed, missing=False)
        gone = {name: ~kept for name, kept in problem.search(0.2, config).keep.items()}
        rng = np.random.default_rng(seed)
        # importance has changed since, and nothing is known of what is gone
        fresh = {n: np.where(gone[n], np.nan, rng.lognormal(0, 1, gone[n].shape)) for n in STRUCTURES}
        stability = {n: np.where(gone[n], np.nan, problem.stability[n]) for n in STRUCTURES}
        found = search(fresh, problem.costs, problem.existing, 0.5, config, stability, gone)
        assert problem.cost(found.keep) == found.removed >= 0.5 * problem.prunable * (1 - 1e-9)
        assert not any((found.keep[n] & gone[n]).any() for n in STRUCTURES)
        if config.allocation == "global" and config.solver == "greedy" and config.attention_share is None:
            left = {n: problem.existing[n] & ~gone[n] for n in STRUCTURES}
            before = sum(int((gone[n].sum(1) * problem.costs[n]).sum()) for n in STRUCTURES)
            share = (0.5 * problem.prunable - before) / (problem.prunable - before)
            rest = search(fresh, problem.costs, left, share, config, stability)
            assert all(np.array_equal(rest.keep[n], found.keep[n]) for n in STRUCTURES)

    def test_without_them_an_unknown_score_is_refused(self):
        problem = Problem(0, missing=False)
        problem.scores["mlp"][0, 0] = np.nan
        gone = {n: np.zeros_like(problem.existing[n]) for n in STRUCTURES}
        gone["mlp"][0, 0] = True
        assert not search(problem.scores, problem.costs, problem.existing, 0.2, FREE, None, gone).keep["mlp"][0, 0]
        with pytest.raises(ValueError, match="scores of mlp unit 0 in layer 0 are not finite"):
            problem.search(0.2, FREE)


class TestWholeLayers:
    """Attention and MLP of a layer go together."""

    CONFIG = SearchConfig(allocation="global", rank_by="score", depth=True, whole_layers=True, min_keep=NO_FLOOR)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
    def test_the_layers_of_the_lowest_mean_go(self, seed, ratio):
        problem = Problem(seed, layers=6, missing=False)
        made = problem.search(ratio, self.CONFIG)
        gone = [not made.keep["mlp"][layer].any() for layer in range(6)]
        means = sum(problem.scores[name].mean(axis=1) for name in STRUCTURES)
        needed = int(np.ceil(6 * ratio))
        assert set(np.flatnonzero(gone)) == set(np.argsort(means)[:needed])
        for name in STRUCTURES:
            assert (made.keep[name].any(axis=1) == ~np.array(gone)).all()
            assert (made.keep[name].all(axis=1) == ~np.array(gone)).all()

    def test_a_layer_that_lacks_one_goes_by_the_other(self):
        problem = Problem(1, layers=3, missing=False)
        problem.existing["mlp"][0] = False
        problem.existing["attention"][1] = False
        for name in STRUCTURES:
            problem.scores[name] = np.where(problem.existing[name], np.arange(3.0)[:, None], np.nan)
        first = problem.search(0.05, self.CONFIG)
        assert not first.keep["attention"][0].any()
        assert first.keep["mlp"][1:].all()
        second = problem.search(0.4, self.CONFIG)
        assert not second.keep["mlp"][1].any()
        assert second.keep["attention"][2].all()

    def test_it_takes_depth_of_both(self):
        for options in ({"depth": False}, {"min_keep": PerStructure(attention=1, mlp=0)}):
            with pytest.raises(ValueError, match=r"search.whole_layers: expected search.depth"):
                dataclasses.replace(self.CONFIG, **options)


class TestUniformFloor:
    """The rule of LLM-Pruner: each layer loses a share of its heads, rounded down; channels fill the budget."""

    def kept(self, ratio: float, allocation: str = "uniform_floor", **options):
        costs = {"attention": np.full(8, 294_912, np.int64), "mlp": np.full(8, 1_728, np.int64)}
        existing = {"attention": np.ones((8, 3), bool), "mlp": np.ones((8, 1536), bool)}
        scores = {name: np.random.default_rng(1).random(units.shape) for name, units in existing.items()}
        config = SearchConfig(allocation=allocation, **options)
        return search(scores, costs, existing, ratio, config)

    @pytest.mark.parametrize(("ratio", "heads"), [(0.2, 3), (0.33, 3), (0.34, 2), (0.5, 2), (0.66, 2), (0.67, 1)])
    def test_heads_are_rounded_down_and_channels_fill(self, ratio, heads):
        made = self.kept(ratio)
        assert (made.keep["attention"].sum(1) == heads).all()
        layer = 3 * 294_912 + 1536 * 1_728
        left = ratio * layer - (3 - heads) * 294_912
        assert np.ptp(made.keep["mlp"].sum(1)) <= 1
        np.testing.assert_allclose(1536 - made.keep["mlp"].sum(1).mean(), left / 1_728, atol=1)
        assert ratio <= made.actual < ratio + 294_912 / (8 * layer)

    def test_the_share_is_that_of_the_layers_that_are_not_left_alone(self):
        made = self.kept(0.5, skip_layers=(0, 1))  # the six others lose two thirds each
        assert made.keep["attention"].sum(1).tolist() == [3, 3, 1, 1, 1, 1, 1, 1]
        assert self.kept(0.49, skip_layers=(0, 1)).keep["attention"].sum(1).tolist() == [3, 3, 2, 2, 2, 2, 2, 2]

    def test_uniform_takes_heads_and_channels_alike_instead(self):
        heads = {
            n: self.kept(0.47, n, skip_layers=(0, 1)).keep["attention"][2:].sum(1) for n in ("uniform", "uniform_floor")
        }
        assert (heads["uniform_floor"] == 2).all()
        assert (heads["uniform"] == 1).all()

    def test_log_gives_deeper_layers_more(self):
        made = self.kept(0.3, "log")
        gone = 3 * 294_912 - made.keep["attention"].sum(1) * 294_912 + (1536 - made.keep["mlp"].sum(1)) * 1_728
        expected = np.log1p(np.arange(8)) / np.log1p(np.arange(8)).sum() * gone.sum()
        np.testing.assert_allclose(gone, expected, atol=2 * 1_728)
        share = expected / (3 * 294_912 + 1536 * 1_728)
        assert made.keep["attention"].sum(1).tolist() == (3 - np.floor(3 * share)).tolist()

    @pytest.mark.parametrize(("ratio", "temperature", "bound"), [(0.2, 1.0, 0), (0.5, 0.3, 1), (0.6, 0.05, 3)])
    def test_softmax_gives_what_its_problem_is_solved_by(self, ratio, temperature, bound):
        """max Σ s (1 - φ) + ε Σ -φ log φ with a given mean of φ and φ <= 1, by another solver."""
        scores = np.array([0.9, 0.2, 0.5, 0.1, 0.7, 0.3])
        costs, existing = {"mlp": np.full(6, 3)}, {"mlp": np.ones((6, 2000), bool)}
        costs["attention"], existing["attention"] = np.zeros(6, np.int64), np.zeros((6, 0), bool)
        given = {"mlp": np.broadcast_to(scores[:, None], (6, 2000)), "attention": np.zeros((6, 0))}
        config = SearchConfig(
            allocation="softmax", softmax_temperature=temperature, min_keep=PerStructure(attention=0, mlp=0)
        )
        made = search(given, costs, existing, ratio, config)
        solved = minimize(
            lambda phi: -(scores * (1 - phi)).sum() + temperature * (phi * np.log(phi)).sum(),
            np.full(6, ratio),
            bounds=[(1e-9, 1)] * 6,
            constraints={"type": "eq", "fun": lambda phi: phi.mean() - ratio},
            options={"ftol": 1e-12, "maxiter": 1000},
            method="SLSQP",
        )
        gone = 1 - made.keep["mlp"].mean(axis=1)
        np.testing.assert_allclose(gone, solved.x, atol=2e-3)
        assert (gone == 1).sum() == bound
        flat = search(given, costs, existing, ratio, dataclasses.replace(config, softmax_temperature=1e6))
        assert np.ptp(flat.keep["mlp"].sum(axis=1)) <= 1 < np.ptp(made.keep["mlp"].sum(axis=1))

    def test_softmax_takes_all_that_there_is(self):
        config = {"allocation": "softmax", "softmax_temperature": 0.01, "skip_layers": (0,)}
        config["min_keep"] = PerStructure(attention=0, mlp=1)
        made = self.kept(0.87, **config)
        assert made.keep["mlp"][0].all()
        assert made.actual >= 0.87
        with pytest.raises(ValueError, match=r"the largest possible ratio is 0\.87\d\d under"):
            self.kept(0.88, **config)

    def test_more_heads_go_where_channels_do_not_suffice(self):
        made = self.kept(0.5, max_ratio=SharePerStructure(attention=1.0, mlp=0.5))
        assert made.actual >= 0.5
        assert (made.keep["attention"].sum(1) < 2).any()
