"""The search: brute force and an exact knapsack beside it, the rules it must obey on random problems, small cases."""

import dataclasses
import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from saap_jax.steps.allocation import budget
from saap_jax.steps.allocation import search as search_module
from saap_jax.steps.allocation.allocation import Allocation
from saap_jax.steps.allocation.ranking import Global
from saap_jax.steps.allocation.search import Prunable, Selection, search
from saap_jax.steps.allocation.softmax import Softmax
from saap_jax.steps.allocation.uniform import Uniform
from saap_jax.steps.base import Context, State
from saap_jax.steps.chain import limits_of, parse, steps_of
from saap_jax.steps.limits import Within, protected
from saap_jax.steps.score.calibrate import Calibrated
from saap_jax.subjects.base import Subject
from saap_jax.types import STRUCTURES

FREE = "within(min_keep=0) > global"
MLP_ONLY = "within(min_keep=0, max_ratio={attention: 0}) > global"


class Unseen(Subject):
    """A model that steps before a budget do not look at."""


Unseen.__abstractmethods__ = frozenset()
ON = Context(dense=Unseen(), scenarios={}, ratio=0.0, final=0.0)


def searched(scores, prunable: Prunable, ratio: float, method: str, stability=None, gone=None) -> Selection:
    """Follow the steps of a chain behind its score."""
    keep = {n: units if gone is None else units & ~gone[n] for n, units in prunable.existing.items()}
    scored = Calibrated({"text": {"own": scores}}, stability, {})
    state = State(ON.dense, keep, Within(), scored=scored, label="own", scores=scores)
    for step in steps_of(method):
        if isinstance(step, Allocation):
            return search(state.scores, prunable, ratio, step, state.limits, gone)
        state = step(state, ON, lambda state, ratio: state)
    raise AssertionError("no allocation")


def whole(**arrays) -> dict[str, np.ndarray]:
    """All units of scores."""
    return {name: np.ones(np.shape(values), bool) for name, values in arrays.items()}


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

    def search(self, ratio: float, method: str, gone=None) -> Selection:
        return searched(self.scores, Prunable(self.costs, self.existing), ratio, method, self.stability, gone)

    @property
    def prunable(self) -> int:
        return sum(int((self.existing[n].sum(1) * self.costs[n]).sum()) for n in STRUCTURES)

    def cost(self, keep) -> int:
        return sum(int(((self.existing[n] & ~keep[n]).sum(1) * self.costs[n]).sum()) for n in STRUCTURES)

    def loss(self, keep) -> float:
        return float(sum(self.scores[n][self.existing[n] & ~keep[n]].sum() for n in STRUCTURES))


def within_of(method: str) -> Within:
    return limits_of(parse(f"wanda > {method}"))


def allowed(problem: Problem, keep, method: str) -> bool:
    """Say whether a keep-set obeys floors, caps, alignment and the layers left alone."""
    layers, within = len(keep["mlp"]), within_of(method)
    alone = {layer % layers for layer in within.protect}
    for name in STRUCTURES:
        if (keep[name] & ~problem.existing[name]).any():
            return False
        for layer in range(layers):
            units, kept = int(problem.existing[name][layer].sum()), int(keep[name][layer].sum())
            if kept == units:
                continue
            if layer in alone or kept < within.of("min_keep", name, 1):
                return False
            if units - kept > units * within.of("max_ratio", name, 1.0) + 1e-9:
                return False
            if kept % (units if within.depth else within.of("multiple_of", name, 1)):
                return False
    return True


def last_blocks(problem: Problem, keep, method: str):
    """Yield (structure, layer, parameters) of the block that was last removed from each layer."""
    within = within_of(method)
    for name in STRUCTURES:
        for layer, kept in enumerate(keep[name].sum(1)):
            units, multiple = int(problem.existing[name][layer].sum()), within.of("multiple_of", name, 1)
            gone = units - int(kept)
            if gone:
                first = units % multiple or multiple
                block = gone if within.depth or gone == first else multiple
                yield name, layer, block * int(problem.costs[name][layer])


def brute_force(problem: Problem, target: int, method: str) -> float:
    """Return the lowest sum of scores that any allowed keep-set removes with at least `target` parameters."""
    within = within_of(method)
    where = [(n, *map(int, at)) for n in STRUCTURES for at in np.argwhere(problem.existing[n])]
    where = [(n, layer, unit) for n, layer, unit in where if within.of("max_ratio", n, 1.0) > 0]
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
            if allowed(problem, keep, method):
                best = loss
    return best


@st.composite
def methods(draw, *, plain: bool = False, ranked: bool = False) -> str:
    """Draw steps behind a score; `plain` without a share for attention, and the greedy solver."""
    of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    allocation = "global" if ranked else of("uniform", "uniform(floor=True)", "log", "softmax(0.1)", *["global"] * 4)
    ranks, early = allocation == "global", []
    depth = ranks and of(False, False, True)
    limits = [f"protect={of('()', '()', '(0,)', '(-1,)', '(0, -1)')}", f"depth={depth}"]
    limits += [f"multiple_of={{attention: {of(1, 2, 3)}, mlp: {of(1, 2, 3)}}}"]
    limits += ["min_keep=0"] if depth else [f"min_keep={{attention: {of(0, 1, 2)}, mlp: {of(0, 1, 2)}}}"]
    limits += [] if depth else [f"max_ratio={{attention: {of(1.0, 0.7, 0.5)}, mlp: {of(1.0, 0.7, 0.5)}}}"]
    share = None if plain else of(None, None, 0.0, 0.3, 1.0)
    if share is not None:
        limits += [f"attention={share}", f"attention_from={of(0.0, 0.0, 0.2)}"]
    if ranks:
        solver = "greedy" if plain else of("greedy", "exact")
        allocation = f"global(by={of('score', 'score_per_parameter')}, solver={solver})"
        early = [of("none", "none", "stable(-0.5)", "stable(0.5)")]
    return " > ".join([of("none", "normalize"), *early, f"within({', '.join(limits)})", allocation])


def largest_ratio(problem: Problem, method: str) -> float:
    """Return the largest possible ratio that the refusal of an impossible one names; 1 where all can be removed."""
    try:
        problem.search(1 - 1e-9, method)
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
            "",
            "min_keep={attention: 0, mlp: 2}",
            "max_ratio={attention: 0, mlp: 0.5}",
            "protect=(-1,)",
            "multiple_of={mlp: 2}",
        ],
    )
    def test_equal_costs_remove_the_least_score_of_all_keep_sets(self, seed, limits):
        problem = Problem(seed, layers=2, heads=1, channels=4, missing=False)
        method = f"within(min_keep=0, max_ratio={{attention: 0}}) > within({limits}) > global"
        for ratio in (0.1, 0.25):
            got = problem.search(ratio, method)
            assert allowed(problem, got.keep, method)
            want = brute_force(problem, int(np.ceil(ratio * problem.prunable)), method)
            assert problem.loss(got.keep) == pytest.approx(want, rel=1e-12)

    def test_another_ranking_is_not_the_optimum(self):
        problem = Problem(0, layers=2, heads=1, channels=4, missing=False)
        got = problem.search(0.25, MLP_ONLY)
        best = problem.loss(got.keep)
        scores, problem.scores = problem.scores, {n: -s for n, s in problem.scores.items()}
        backwards, problem.scores = problem.search(0.25, MLP_ONLY), scores
        assert problem.loss(backwards.keep) > 1.5 * best

    @given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.booleans(), st.sampled_from([1, 2]))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_two_costs_stay_within_one_block_and_exact_is_the_optimum(self, seed, ratio, ties, multiple):
        problem = Problem(seed, layers=2, heads=2, channels=3, costs=(7, 2), ties=ties)
        method = f"within(min_keep=0, multiple_of={{mlp: {multiple}}}) > global"
        target = int(np.ceil(ratio * problem.prunable - 1e-9))
        assume(target > 0)
        best = brute_force(problem, target, method)
        exact = problem.search(ratio, f"{method}(solver=exact)")
        assert problem.loss(exact.keep) == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert allowed(problem, exact.keep, method)
        assert exact.removed >= target
        greedy = problem.loss(problem.search(ratio, method).keep)
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
        greedy, exact = (
            searched(scores, Prunable(costs, whole(**scores)), 2 / 6, f"{FREE}(solver={solver})")
            for solver in ("greedy", "exact")
        )
        assert greedy.removed == 3
        assert not greedy.keep["attention"].any()
        assert exact.removed == 2
        assert exact.keep["mlp"].tolist() == [[False, False, True]]

    def test_exact_shifts_negative_scores_and_removes_no_more_than_asked(self):
        problem = Problem(0, heads=1, missing=False)
        problem.scores = {n: s - 10 for n, s in problem.scores.items()}
        exact, plain = problem.search(0.2, f"{MLP_ONLY}(solver=exact)"), problem.search(0.2, MLP_ONLY)
        for got, want in zip(exact, plain, strict=True):
            np.testing.assert_equal(got, want)

    def test_exact_refuses_large_problems(self, monkeypatch):
        monkeypatch.setattr(budget, "EXACT_LIMIT", 100)
        with pytest.raises(ValueError, match=r"at most 100 steps, got [\d,]+ .27 blocks times \d+ sizes"):
            Problem(0, missing=False).search(0.5, f"{FREE}(solver=exact)")


class TestRules:
    @pytest.mark.slow
    @given(st.integers(0, 10_000), methods(), st.floats(0, 0.95), st.booleans())
    @settings(max_examples=150, deadline=None, derandomize=True)
    def test_obeys_all_limits_and_meets_the_budget_by_less_than_a_block(self, seed, method, ratio, ties):
        problem = Problem(seed, ties=ties)
        try:
            got = problem.search(ratio, method)
        except ValueError as refused:
            assert "largest possible ratio" in str(refused)  # noqa: PT017
            assert ratio > largest_ratio(problem, method)
            return
        assert allowed(problem, got.keep, method)
        assert got.removed == problem.cost(got.keep)
        assert got.asked == ratio
        assert got.actual == pytest.approx(got.removed / problem.prunable)
        assert got.removed >= ratio * problem.prunable - 1e-6
        for _, _, parameters in last_blocks(problem, got.keep, method):
            assert got.removed - parameters < ratio * problem.prunable

    @pytest.mark.slow
    @given(st.integers(0, 10_000), methods())
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_the_largest_ratio_is_possible_and_the_next_is_not(self, seed, method):
        problem, (*_, allocation) = Problem(seed), steps_of(method)
        largest, prunable = largest_ratio(problem, method), Prunable(problem.costs, problem.existing)
        assert search_module.largest_ratio(prunable, allocation, within_of(method)) == min(largest, 0.9999)
        assume(largest < 1)
        assert problem.search(largest, method).actual >= largest - 1e-9
        with pytest.raises(ValueError, match="cannot be removed"):
            problem.search(largest + 1e-4, method)

    @pytest.mark.slow
    @given(st.integers(0, 10_000), methods(plain=True, ranked=True), st.floats(0, 0.9))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_one_budget_removes_the_same_when_asked_for_what_it_removed(self, seed, method, ratio):
        problem = Problem(seed)
        assume(ratio <= largest_ratio(problem, method))
        first = problem.search(ratio, method)
        assume(first.actual < 1)
        assert problem.search(first.actual, method).removed == first.removed

    @pytest.mark.parametrize("units", [7, 49, 100])
    def test_the_ratio_of_whole_units_asks_for_just_these(self, units):
        # 0.07 * 100 is a little over 7, and 1 / 49 * 49 a little under 1
        scores = {"attention": np.ones((1, 1)), "mlp": np.arange(1.0, units)[None]}
        prunable = Prunable({n: np.array([1]) for n in STRUCTURES}, whole(**scores))
        for gone in range(units):
            assert searched(scores, prunable, gone / units, FREE).removed == gone

    def test_equal_scores_leave_aligned_blocks_in_order(self):
        problem = Problem(0, layers=1, heads=1, channels=7, costs=(1, 1), missing=False)
        problem.scores = {"attention": np.ones((1, 1)), "mlp": np.full((1, 7), 0.1)}
        found = [problem.search(r, "within(min_keep=0, multiple_of={mlp: 4}) > global") for r in (0.1, 0.5)]
        assert [each.removed for each in found] == [3, 7]
        assert problem.cost(found[0].keep) == 3

    @pytest.mark.slow
    @given(st.integers(0, 10_000), methods(), st.floats(0, 0.9))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_keep_sets_permute_with_the_units(self, seed, method, ratio):
        problem, moved = Problem(seed), Problem(seed)
        assume(ratio <= largest_ratio(problem, method))
        rng = np.random.default_rng(seed)
        orders = {n: np.argsort(rng.random(s.shape), axis=1) for n, s in problem.scores.items()}
        for tree in ("scores", "existing", "stability"):
            setattr(moved, tree, {n: np.take_along_axis(v, orders[n], 1) for n, v in getattr(problem, tree).items()})
        keep, permuted = problem.search(ratio, method).keep, moved.search(ratio, method).keep
        for name in STRUCTURES:
            np.testing.assert_array_equal(permuted[name], np.take_along_axis(keep[name], orders[name], 1))

    @pytest.mark.slow
    @given(st.integers(0, 10_000), methods(), st.floats(0, 0.9), st.sampled_from([2.0**-40, 2.0**40]))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_the_scale_of_the_scores_does_not_matter(self, seed, method, ratio, scale):
        problem = Problem(seed)
        assume(ratio <= largest_ratio(problem, method))
        keep = problem.search(ratio, method).keep
        problem.scores = {n: s * scale for n, s in problem.scores.items()}
        unit = 0.1 if "normalize" in method else 0.1 * scale
        scaled = problem.search(ratio, method.replace("softmax(0.1)", f"softmax({unit})")).keep
        assert all((keep[n] == scaled[n]).all() for n in STRUCTURES)

    @given(st.integers(0, 10_000), st.sampled_from(["none", "stable"]), st.booleans())
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_keep_sets_are_nested_where_blocks_cost_the_same(self, seed, early, ties):
        problem = Problem(seed, costs=(2, 2), ties=ties)
        keeps = [problem.search(r, f"{early} > {FREE}").keep for r in (0.2, 0.4, 0.6, 0.8)]
        for more, less in itertools.pairwise(keeps):
            assert all((more[n] | ~less[n]).all() for n in STRUCTURES)

    def test_keep_sets_are_not_nested_where_a_dear_block_replaces_cheap_ones(self):
        scores = {"attention": np.array([[5.0]]), "mlp": np.array([[1.0, 1.0]])}
        costs = {"attention": np.array([3]), "mlp": np.array([1])}
        two, three = (searched(scores, Prunable(costs, whole(**scores)), n / 5, FREE).keep for n in (2, 3))
        assert two["attention"].all()
        assert not two["mlp"].any()
        assert three["mlp"].all()
        assert not three["attention"].any()


class TestTies:
    def test_cheaper_then_attention_then_lower_layer_then_lower_index(self):
        method, scores = f"{FREE}(by=score)", {"attention": np.ones((2, 2)), "mlp": np.ones((2, 2))}
        dear, even = (Prunable({"attention": np.full(2, c), "mlp": np.ones(2, int)}, whole(**scores)) for c in (3, 1))
        assert searched(scores, dear, 2 / 16, method).keep["mlp"].tolist() == [[False, False], [True, True]]
        one = searched(scores, even, 1 / 8, method).keep
        assert one["attention"].tolist() == [[False, True], [True, True]]
        five = searched(scores, even, 5 / 8, method).keep
        assert not five["attention"].any()
        assert five["mlp"].tolist() == [[False, True], [True, True]]


class TestUniform:
    def dense(self, layers=4, heads=4, channels=24, costs=(6, 1)) -> Problem:
        return Problem(0, layers=layers, heads=heads, channels=channels, costs=costs, missing=False)

    @pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
    def test_every_layer_loses_the_same_share_of_both_structures(self, ratio):
        keep = self.dense().search(ratio, "uniform").keep
        assert len(set(keep["attention"].sum(1))) == 1
        assert len(set(keep["mlp"].sum(1))) == 1
        if ratio != 0.125:
            assert keep["attention"].sum(1)[0] == 4 * (1 - ratio)
            assert keep["mlp"].sum(1)[0] == 24 * (1 - ratio)

    def test_the_least_important_units_of_each_layer_go(self):
        problem = self.dense()
        keep = problem.search(0.5, "uniform").keep
        for name in STRUCTURES:
            kept = np.where(keep[name], problem.scores[name], np.inf).min(1)
            assert (np.where(keep[name], -np.inf, problem.scores[name]).max(1) < kept).all()

    def test_layers_left_alone_lose_nothing_and_the_others_their_part(self):
        keep = self.dense().search(0.25, "within(protect=(0, -1)) > uniform").keep
        for name in STRUCTURES:
            assert keep[name][[0, 3]].all()
            assert keep[name][[1, 2]].sum() == keep[name][[1, 2]].size / 2

    def test_what_is_left_over_goes_to_the_first_layers(self):
        problem = self.dense()
        keep = problem.search(6 / problem.prunable, "uniform").keep
        assert keep["mlp"].sum(1).tolist() == [22, 22, 23, 23]
        coarse = "within(multiple_of={mlp: 8}, max_ratio={attention: 0}) > uniform"
        assert problem.search(16 / problem.prunable, coarse).keep["mlp"].sum(1).tolist() == [16, 16, 24, 24]

    @given(st.integers(0, 10_000), st.floats(0, 0.6), st.sampled_from([None, 0.4]))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_budgets_are_met_within_a_block(self, seed, ratio, share):
        problem, method = Problem(seed, channels=12), f"within(attention={share}, min_keep=0) > uniform"
        assume(ratio <= largest_ratio(problem, method))
        keep = problem.search(ratio, method).keep
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
            problem.search(0.25, "uniform")
        assert problem.search(0.25, "within(protect=(2,)) > uniform").actual >= 0.25

    def test_a_layer_without_units_does_not_count(self):
        problem = self.dense()
        problem.existing["mlp"][2] = problem.existing["attention"][2] = False
        assert problem.search(0.25, "uniform").actual == pytest.approx(0.25)


class TestRankings:
    @pytest.mark.parametrize("weight", [-0.5, 0.5])
    def test_stable_removes_the_lowest_log_score_plus_weighted_stability(self, weight):
        problem = Problem(3, costs=(2, 2), missing=False)
        keep = problem.search(1 / 3, f"stable({weight}) > {FREE}").keep
        ranked = np.concatenate(
            [(np.log(problem.scores[n]) + weight * problem.stability[n]).ravel() for n in STRUCTURES]
        )
        want = ranked > np.sort(ranked)[8]
        np.testing.assert_array_equal(np.concatenate([keep[n].ravel() for n in STRUCTURES]), want)
        plain = problem.search(1 / 3, FREE).keep
        assert any((plain[n] != keep[n]).any() for n in STRUCTURES)

    @pytest.mark.parametrize("rank_by", ["score", "score_per_parameter"])
    def test_stable_is_the_global_ranking_of_the_exponential(self, rank_by):
        problem, other = Problem(3), Problem(3)
        other.scores = {n: s * np.exp(0.5 * problem.stability[n]) for n, s in problem.scores.items()}
        got = problem.search(0.4, f"stable(0.5) > {FREE}(by={rank_by})").keep
        want = other.search(0.4, f"{FREE}(by={rank_by})").keep
        assert all((got[n] == want[n]).all() for n in STRUCTURES)

    @pytest.mark.parametrize(("weight", "kept"), [(1.0, 1), (-1.0, 0)])
    def test_the_sign_of_the_weight_keeps_or_removes_the_unstable_unit(self, weight, kept):
        scores = {"attention": np.ones((1, 1)), "mlp": np.ones((1, 2))}
        prunable = Prunable({n: np.array([1]) for n in STRUCTURES}, whole(**scores))
        stability = {"attention": np.zeros((1, 1)), "mlp": np.array([[-1.0, 1.0]])}
        keep = searched(scores, prunable, 1 / 3, f"stable({weight}) > {MLP_ONLY}", stability).keep["mlp"]
        assert np.flatnonzero(keep[0]).tolist() == [kept]

    @given(st.integers(0, 10_000), st.sampled_from([1, 2]))
    @settings(max_examples=20, deadline=None, derandomize=True)
    def test_weight_zero_is_the_global_ranking(self, seed, multiple):
        problem, method = Problem(seed), f"within(min_keep=0, multiple_of={{mlp: {multiple}}}) > global"
        keep, same = (problem.search(0.4, each).keep for each in (method, f"stable(0.0) > {method}"))
        assert all((keep[n] == same[n]).all() for n in STRUCTURES)

    def test_stable_needs_the_indicator_and_scores_of_at_least_zero(self):
        problem = Problem(0, missing=False)
        stability, problem.stability = problem.stability, None
        with pytest.raises(ValueError, match="expected a stability indicator over two examples or more, got none"):
            problem.search(0.2, f"stable > {FREE}")
        problem.stability = stability
        problem.scores["mlp"][1, 2] = -1
        with pytest.raises(ValueError, match="got -1 for mlp unit 2 in layer 1"):
            problem.search(0.2, f"stable > {FREE}")
        assert problem.search(0.2, FREE).actual >= 0.2

    def test_rank_by_decides_whether_dear_units_seem_worth_more(self):
        scores = {"attention": np.array([[4.0]]), "mlp": np.array([[2.0, 2.0]])}
        costs = {"attention": np.array([4]), "mlp": np.array([1])}
        for by, attention in (("score", True), ("score_per_parameter", False)):
            found = searched(scores, Prunable(costs, whole(**scores)), 1 / 6, f"{FREE}(by={by})")
            assert found.keep["attention"].all() == attention

    def test_structure_mean_makes_structures_comparable(self):
        problem, plain = Problem(0, missing=False), f"{FREE}(by=score)"
        keep = problem.search(0.4, f"normalize > {plain}").keep
        problem.scores["mlp"] = problem.scores["mlp"] * 1024
        assert all((problem.search(0.4, f"normalize > {plain}").keep[n] == keep[n]).all() for n in STRUCTURES)
        assert (problem.search(0.4, plain).keep["attention"] != keep["attention"]).any()
        problem.scores["mlp"] = np.zeros_like(problem.scores["mlp"])
        with pytest.raises(ValueError, match="expects scores of mlp with a mean above 0, got 0"):
            problem.search(0.4, f"normalize > {plain}")

    @pytest.mark.parametrize("seed", range(5))
    def test_flap_as_a_chain(self, seed):
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
        keep = problem.search(float(ratio), f"normalize(layer_zscore) > {FREE}(by=score)").keep
        np.testing.assert_array_equal(np.concatenate([keep[n].ravel() for n in STRUCTURES]), want)
        other = problem.search(float(ratio), f"{FREE}(by=score)").keep
        assert (np.concatenate([other[n].ravel() for n in STRUCTURES]) != want).any()

    def test_a_single_unit_a_layer_leaves_all_to_the_mlp(self):
        """As `saap prune` meets a model with one KV head; with two of them the share is met."""
        for heads, gone in ((1, 0), (2, 2)):
            existing = {"attention": np.ones((4, heads), bool), "mlp": np.ones((4, 10), bool)}
            costs = {"attention": np.full(4, 5), "mlp": np.full(4, 1)}
            scores = {name: np.arange(units.size, dtype=float).reshape(units.shape) for name, units in existing.items()}
            prunable, share = Prunable(costs, existing), Within(attention=0.5)
            for more in ("", ", max_segments=2"):
                chosen = searched(scores, prunable, 0.25, f"within(attention=0.5{more}) > uniform")
                assert (int((~chosen.keep["attention"]).sum()) > 0) == (gone > 0)
                assert chosen.actual >= 0.25
            assert search_module.largest_ratio(prunable, *steps_of("uniform"), share) > 0.25

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
        method = f"within(min_keep=0, attention={share}, attention_from={start}) > global(by={rank_by})"
        assume(largest_ratio(problem, method) >= 0.3)
        got = problem.search(0.3, method)
        attention = int((problem.existing["attention"] & ~got.keep["attention"]).sum()) * 7
        assert abs(attention - share * max(0.3 - start, 0) * problem.prunable) <= 7


class TestDepth:
    METHOD = "within(min_keep=0, depth=True) > global"

    def test_removes_the_sub_blocks_of_least_mean_score(self):
        scores = {"attention": np.array([[5.0, 5.0], [1.0, 2.0]]), "mlp": np.array([[4.0, 0.0], [9.0, 9.0]])}
        prunable = Prunable({n: np.full(2, 2) for n in STRUCTURES}, whole(**scores))
        one = searched(scores, prunable, 0.25, self.METHOD).keep
        assert (one["attention"].tolist(), one["mlp"].all()) == ([[True, True], [False, False]], True)
        two = searched(scores, prunable, 0.5, self.METHOD).keep
        assert not two["attention"][1].any()
        assert not two["mlp"][0].any()
        assert two["attention"][0].all()
        # without depth the dead channel goes first
        assert searched(scores, prunable, 0.125, FREE).keep["mlp"].tolist() == [[True, False], [True, True]]

    def test_a_structure_with_a_floor_keeps_all_its_sub_blocks(self):
        problem = Problem(0, missing=False)
        keep = problem.search(0.3, "within(min_keep={attention: 0}, depth=True) > global").keep
        assert keep["mlp"].all()
        assert not keep["attention"].all()


class TestRefusals:
    @pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan"), float("inf")])
    def test_ratios(self, ratio):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
            Problem(0).search(ratio, FREE)

    def test_ratio_zero_removes_nothing(self):
        for method in ("uniform", FREE, "within(protect=(0, 1, 2)) > uniform"):
            got = Problem(0).search(0.0, method)
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
            Problem(0).search(0.2, "within(protect=(3,)) > global")
        with pytest.raises(ValueError, match=r"largest possible ratio is 0\.0000"):
            Problem(0).search(0.2, "within(protect=(0, 1, 2)) > uniform")

    def test_a_share_of_the_layers_left_alone(self):
        """By hand, at depths of models that there are; of 32 layers what LLM-Pruner says by number."""
        for depth, first, last in ((32, 4, 2), (30, 4, 2), (18, 2, 1), (12, 2, 1), (3, 0, 0)):
            by_hand = np.isin(np.arange(depth), [*range(first), *range(depth - last, depth)])
            np.testing.assert_array_equal(protected((0.13, -0.07), depth), by_hand)
        np.testing.assert_array_equal(protected((0, -1), 18), protected((0.06, -0.06), 18))
        np.testing.assert_array_equal(protected((0.5, 17), 18).nonzero()[0], [*range(9), 17])
        for wrong in (1.5, -1.2, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"within.protect: expected numbers of layers, or shares .* {wrong}"):
                Within(protect=(wrong,))

    def test_a_model_without_units(self):
        problem = Problem(0)
        problem.existing = {n: np.zeros_like(e) for n, e in problem.existing.items()}
        assert problem.search(0.5, "uniform").removed == 0

    def test_takes_jax_arrays(self):
        problem = Problem(0)
        want = problem.search(0.3, FREE).keep
        problem.scores = {n: jnp.asarray(s, jnp.float32) for n, s in problem.scores.items()}
        got = problem.search(0.3, FREE).keep
        assert all((got[n] == want[n]).all() for n in STRUCTURES)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("stable(x)", "stable.weight: expected float, got 'x'"),
            ("softmax(0.0)", "softmax.temperature: expected a number above 0, got 0"),
            ("within(attention=1.5)", r"within.attention: expected a number in \[0, 1\], got 1.5"),
            ("within(attention_from=0.2)", "within.attention_from: expected attention beside it, got 0.2 alone"),
            ("within(multiple_of=0)", "within.multiple_of: expected at least 1, got 0"),
            ("within(max_ratio={mlp: 2})", r"within.max_ratio: expected a number in \[0, 1\], got 2"),
            (
                "within(depth=True) > uniform",
                "within.depth: expected a ranking of all units behind it, global, got uni",
            ),
            ("uniform(solver=exact)", "unknown option 'solver'; uniform takes floor"),
            ("within(depth=True) > global", r"largest possible ratio is 0\.0000 under min_keep"),
            ("within(whole_layers=True)", "within.whole_layers: expected depth beside it"),
            ("within(depth=True, whole_layers=True, min_keep={mlp: 0}) > global", "whole_layers: expected min_keep 0"),
        ],
    )
    def test_options(self, method, message):
        with pytest.raises(ValueError, match=message):
            Problem(0).search(0.2, method)


class TestGone:
    """Units that an earlier step removed."""

    METHODS = (
        FREE,
        f"{FREE}(by=score)",
        f"normalize(layer_zscore) > {FREE}(by=score)",
        f"stable(0.5) > {FREE}",
        "within(min_keep=0, attention=0.3) > global",
        "within(min_keep=0, attention=0.5, attention_from=0.2) > global",
        f"{FREE}(solver=exact)",
        "within(min_keep=0) > uniform",
    )

    @given(seed=st.integers(0, 1000), method=st.sampled_from(METHODS))
    @settings(max_examples=60, deadline=None)
    def test_they_go_first_and_their_scores_are_not_read(self, seed, method):
        problem = Problem(seed, missing=False)
        gone = {name: ~kept for name, kept in problem.search(0.2, method).keep.items()}
        rng = np.random.default_rng(seed)
        # importance has changed since, and nothing is known of what is gone
        problem.scores = {n: np.where(gone[n], np.nan, rng.lognormal(0, 1, gone[n].shape)) for n in STRUCTURES}
        problem.stability = {n: np.where(gone[n], np.nan, problem.stability[n]) for n in STRUCTURES}
        found = problem.search(0.5, method, gone)
        assert problem.cost(found.keep) == found.removed >= 0.5 * problem.prunable * (1 - 1e-9)
        assert not any((found.keep[n] & gone[n]).any() for n in STRUCTURES)
        if "global" in method and "exact" not in method and "attention" not in method:
            before = sum(int((gone[n].sum(1) * problem.costs[n]).sum()) for n in STRUCTURES)
            share = (0.5 * problem.prunable - before) / (problem.prunable - before)
            problem.existing = {n: problem.existing[n] & ~gone[n] for n in STRUCTURES}
            rest = problem.search(share, method)
            assert all(np.array_equal(rest.keep[n], found.keep[n]) for n in STRUCTURES)

    def test_without_them_an_unknown_score_is_refused(self):
        problem = Problem(0, missing=False)
        problem.scores["mlp"][0, 0] = np.nan
        gone = {n: np.zeros_like(problem.existing[n]) for n in STRUCTURES}
        gone["mlp"][0, 0] = True
        assert not problem.search(0.2, FREE, gone).keep["mlp"][0, 0]
        with pytest.raises(ValueError, match="scores of mlp unit 0 in layer 0 are not finite"):
            problem.search(0.2, FREE)


class TestWholeLayers:
    """Attention and MLP of a layer go together."""

    METHOD = "within(depth=True, whole_layers=True, min_keep=0) > global(by=score)"

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
    def test_the_layers_of_the_lowest_mean_go(self, seed, ratio):
        problem = Problem(seed, layers=6, missing=False)
        made = problem.search(ratio, self.METHOD)
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
        first = problem.search(0.05, self.METHOD)
        assert not first.keep["attention"][0].any()
        assert first.keep["mlp"][1:].all()
        second = problem.search(0.4, self.METHOD)
        assert not second.keep["mlp"][1].any()
        assert second.keep["attention"][2].all()


class TestUniformFloor:
    """The rule of LLM-Pruner: each layer loses a share of its heads, rounded down; channels fill the budget."""

    def kept(self, ratio: float, method: str = "uniform(floor=True)"):
        costs = {"attention": np.full(8, 294_912, np.int64), "mlp": np.full(8, 1_728, np.int64)}
        existing = {"attention": np.ones((8, 3), bool), "mlp": np.ones((8, 1536), bool)}
        scores = {name: np.random.default_rng(1).random(units.shape) for name, units in existing.items()}
        return searched(scores, Prunable(costs, existing), ratio, method)

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
        method = "within(protect=(0, 1)) > uniform(floor=True)"
        made = self.kept(0.5, method)  # the six others lose two thirds each
        assert made.keep["attention"].sum(1).tolist() == [3, 3, 1, 1, 1, 1, 1, 1]
        assert self.kept(0.49, method).keep["attention"].sum(1).tolist() == [3, 3, 2, 2, 2, 2, 2, 2]

    def test_uniform_takes_heads_and_channels_alike_instead(self):
        for floor, heads in ((True, 2), (False, 1)):
            made = self.kept(0.47, f"within(protect=(0, 1)) > uniform(floor={floor})")
            assert (made.keep["attention"][2:].sum(1) == heads).all()

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
        prunable, free = Prunable(costs, existing), Within(min_keep=0)
        made = search(given, prunable, ratio, Softmax(temperature), free)
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
        flat = search(given, prunable, ratio, Softmax(1e6), free)
        assert np.ptp(flat.keep["mlp"].sum(axis=1)) <= 1 < np.ptp(made.keep["mlp"].sum(axis=1))

    def test_softmax_takes_all_that_there_is(self):
        method = "within(protect=(0,), min_keep={attention: 0}) > softmax(0.01)"
        made = self.kept(0.87, method)
        assert made.keep["mlp"][0].all()
        assert made.actual >= 0.87
        with pytest.raises(ValueError, match=r"the largest possible ratio is 0\.87\d\d under"):
            self.kept(0.88, method)

    def test_more_heads_go_where_channels_do_not_suffice(self):
        made = self.kept(0.5, "within(max_ratio={mlp: 0.5}) > uniform(floor=True)")
        assert made.actual >= 0.5
        assert (made.keep["attention"].sum(1) < 2).any()


class TestOwn:
    """Allocations that somebody else writes."""

    def test_shares_and_priorities_decide_the_widths(self):
        @dataclasses.dataclass(frozen=True)
        class Last(Allocation):
            name = "last"

            def shares(self, size, scores):
                return size * [0, 0, 1] / size[-1]

        class Backwards(Global):
            def priority(self, scores):
                return {name: -values for name, values in scores.items()}

        scores = {"attention": np.ones((3, 4)), "mlp": np.arange(1.0, 31).reshape(3, 10)}
        prunable = Prunable({"attention": np.full(3, 10), "mlp": np.full(3, 4)}, whole(**scores))

        def kept(allocation: Allocation) -> list[int]:
            return search(scores, prunable, 0.1, allocation, Within(attention=0.0)).keep["mlp"].sum(axis=1).tolist()

        last, plain, ranked = kept(Last()), kept(Uniform()), kept(Global())
        assert last[:2] == [10, 10]
        assert last[2] < min(plain)
        assert ranked == kept(Backwards())[::-1] != kept(Backwards())

    @pytest.mark.parametrize("wrong", [lambda size: size / 2, lambda size: -size, lambda size: size[:2]])
    def test_shares_that_do_not_make_one_are_refused(self, wrong):
        @dataclasses.dataclass(frozen=True)
        class Wrong(Allocation):
            name = "wrong"

            def shares(self, size, scores):
                return wrong(size)

        with pytest.raises(ValueError, match="wrong: expected shares of at least 0 that make 1 for 2 budgets, got"):
            budget.shares_of(Wrong(), np.array([1, 0, 2]), np.ones(3), np.ones(3), 1)
