"""Sharing a budget: a second plain implementation, brute force over all keep-sets, and small cases by hand."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from saap_jax.steps.allocation.allocation import Allocation, choose, most_removable, shares_of
from saap_jax.steps.allocation.allocations import Global, Log, Softmax, Uniform
from saap_jax.steps.base import Context, State
from saap_jax.steps.chain import steps_of
from saap_jax.steps.limits import Within, protected
from saap_jax.steps.score.calibrate import Calibrated
from saap_jax.steps.score.score import Normalize
from saap_jax.subjects.base import Subject
from saap_jax.types import STRUCTURES, Limits
from tests.helpers import same

FREE = "within(min_keep=0) > global"


class Problem(Subject):
    """Scores and costs of a small model, of which a search knows nothing else."""

    def __init__(self, scores, costs, existing=None, stability=None, own=None) -> None:
        self.scores = {name: np.asarray(each, float) for name, each in scores.items()}
        self.existing = existing or {name: np.ones(each.shape, bool) for name, each in self.scores.items()}
        self.costs = {n: np.full(len(each), costs[n]) for n, each in self.scores.items()}
        self.stability, self.own = stability, own

    @property
    def prunable(self) -> int:
        return sum(int((units.sum(1) * self.costs[name]).sum()) for name, units in self.existing.items())

    def removed(self, keep) -> int:
        return sum(int(((units & ~keep[n]).sum(1) * self.costs[n]).sum()) for n, units in self.existing.items())

    def lost(self, keep) -> float:
        return float(sum(self.scores[n][units & ~keep[n]].sum() for n, units in self.existing.items()))

    def limits(self, within):
        return self.own or within

    def chosen(self, ratio: float, method: str, gone=None):
        """Follow the steps of a chain behind its score."""
        keep = {n: units if gone is None else units & ~gone[n] for n, units in self.existing.items()}
        scored = Calibrated(
            {"text": {"own": self.scores}}, {} if self.stability is None else {"own": self.stability}, {}
        )
        state = State(self, keep, Within(), scored=scored, label="own", scores=self.scores)
        on = Context(dense=self, scenarios={}, ratio=ratio, final=ratio)
        for step in steps_of(method):
            state = step(state, on)
        return state.keep


Problem.__abstractmethods__ = frozenset()


def drawn(seed: int, layers=3, heads=3, channels=6, costs=(7, 2), ties=False, missing=True) -> Problem:
    """A random problem; a few units are missing."""
    rng = np.random.default_rng(seed)
    shapes = {"attention": (layers, heads), "mlp": (layers, channels)}
    draw = (lambda s: rng.integers(0, 4, s).astype(float)) if ties else (lambda s: rng.lognormal(0, 1, s))
    scores = {name: draw(shape) for name, shape in shapes.items()}
    existing = {name: rng.random(shape) > 0.15 * missing for name, shape in shapes.items()}
    stability = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return Problem(scores, dict(zip(STRUCTURES, costs, strict=True)), existing, stability)


def limits_of(method: str) -> Within:
    limits = Within()
    for step in steps_of(method):
        limits = step.joined(limits) if isinstance(step, Within) else limits
    return limits


# --- by a second implementation --------------------------------------------------------------------


def plain_shares(problem: Problem, allocation: Allocation, within: Within, names, blocks, due: float) -> list[float]:
    """What each layer loses of a budget, together 1, by the formula of each allocation."""
    layers, cost = range(len(problem.existing["mlp"])), problem.costs
    none = {*layers} - {each[1] for each in blocks} if len(names) == 1 else set()  # they have nothing to give of it
    size = [0 if layer in alone_of(problem, within) | none else sum(
        int(problem.existing[n][layer].sum() * cost[n][layer]) for n in names) for layer in layers]  # fmt: skip
    weight = [float(each) for each in size]
    if allocation.name == "log":
        weight = [size[layer] * math.log(layer + 1) for layer in layers]
    if allocation.name == "softmax":
        means = [np.concatenate([problem.scores[n][layer][problem.existing[n][layer]] for n in STRUCTURES])
                 for layer in layers]  # fmt: skip
        weight = [size[layer] and size[layer] * math.exp(-(means[layer].mean() - 1) / allocation.temperature)
                  for layer in layers]  # fmt: skip
    if not sum(weight):
        weight = [float(each) for each in size]
    shares = [each / (sum(weight) or 1) for each in weight]
    if allocation.name not in ("softmax", "log") or not due:
        return shares
    most = [sum(each[3] for each in blocks if each[1] == layer) / due for layer in layers]
    if allocation.name == "log":  # r + c log(layer + 1), the least r of many that asks no layer for too much
        for part in np.linspace(0, 1, 4001):
            mixed = [
                (1 - part) * share + part * own / (sum(size) or 1) for share, own in zip(shares, size, strict=True)
            ]
            if all(each <= m + 1e-12 for each, m in zip(mixed, most, strict=True)):
                return mixed
        return shares
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        filled = [min(m, middle * share) for m, share in zip(most, shares, strict=True)]
        low, high = (middle, high) if sum(filled) < 1 else (low, middle)
    return filled


def alone_of(problem: Problem, within: Within) -> set[int]:
    return {layer % len(problem.existing["mlp"]) for layer in within.protect}


def plain_blocks(problem: Problem, allocation: Allocation, within: Within):
    """Yield (structure, layer, units, cost, mean priority, share gone) of each block, in order within its layer."""
    for name in STRUCTURES:
        for layer, exists in enumerate(problem.existing[name]):
            if layer in alone_of(problem, within):
                continue
            cost = int(problem.costs[name][layer])
            per = cost if allocation.by == "score_per_parameter" else 1
            units = sorted(np.flatnonzero(exists), key=lambda unit: (problem.scores[name][layer, unit], unit))
            count, limit = len(units), within.layer(name)
            step = count if within.depth else limit.multiple_of
            ends = [end for end in range(1, count + 1) if (count - end) % max(step, 1) == 0 and
                    count - end >= limit.min_keep and end <= count * limit.max_ratio + 1e-9]  # fmt: skip
            before, key = 0, -math.inf
            for end in ends:
                some = units[before:end]
                key = max(key, float(np.mean([problem.scores[name][layer, unit] / per for unit in some])))
                yield name, layer, some, cost * len(some), key, end / count
                before = end


def plain(problem: Problem, ratio: float, method: str):
    """Choose units by the rules of `steps.allocation.allocation`, block by block, in lists."""
    *_, allocation = steps_of(method)
    within = limits_of(method).where_can_go(problem.existing).at(ratio)
    target = math.ceil(ratio * problem.prunable - 1e-9)
    everything = [*plain_blocks(problem, allocation, within)]
    parts = [(STRUCTURES, 1.0)]
    if within.attention is not None:
        parts = [(("attention",), within.attention), (("mlp",), 1 - within.attention)]
    beyond = set()
    if allocation.floor:
        shares = plain_shares(problem, allocation, within, STRUCTURES, everything, target)
        for name, layer, some, _, _, gone in everything:
            size = sum(int(problem.existing[n][layer].sum() * problem.costs[n][layer]) for n in STRUCTURES)
            if name == "attention" and gone > target * shares[layer] / size + 1e-9:
                beyond.add((name, layer, some[0]))
    budgets = []
    for names, part in parts:
        own = [each for each in everything if each[0] in names]
        if allocation.ranks:
            budgets.append((own, part))
            continue
        for layer, share in enumerate(plain_shares(problem, allocation, within, names, own, target * part)):
            budgets.append(([each for each in own if each[1] == layer], part * share))

    def rank(block):
        name, layer, some, cost, key, gone = block
        first = key if allocation.ranks else gone + ((name, layer, some[0]) in beyond)
        return round(first, 12), cost, STRUCTURES.index(name), layer, gone

    def without(taken, surplus):
        kept, held = [], set()
        for block in reversed(taken):
            if block[:2] not in held and block[3] <= surplus:
                surplus -= block[3]
            else:
                held.add(block[:2])
                kept.insert(0, block)
        return kept

    levels = []
    for own, share in budgets:
        due, taken = math.ceil(target * share - 1e-9), []
        for block in sorted(own, key=rank):
            if sum(each[3] for each in taken) < due:
                taken.append(block)
        if sum(each[3] for each in taken) < due:
            return None
        taken = without(taken, sum(each[3] for each in taken) - due) if taken else []
        removed = itertools.accumulate(each[3] for each in taken)
        levels += [(round(level / max(due, 1), 12), block) for level, block in zip(removed, taken, strict=True)]
    taken = [block for _, block in sorted(levels, key=lambda level: level[0])]
    if sum(each[3] for each in taken) < target:
        return None
    keep = {name: units.copy() for name, units in problem.existing.items()}
    for name, layer, some, *_ in without(taken, sum(each[3] for each in taken) - target):
        keep[name][layer, some] = False
    return keep


@st.composite
def methods(draw) -> str:
    """Draw limits and an allocation."""
    of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    allocation = of("uniform", "uniform(floor=True)", "log", "softmax(0.3)", "global", "global(by=score)")
    depth = allocation.startswith("global") and of(False, False, True)
    limits = [f"protect={of('()', '()', '(0,)', '(0, -1)')}", f"depth={depth}"]
    if depth:
        limits += ["min_keep=0"]
    else:
        pair = lambda *values: f"{{attention: {of(*values)}, mlp: {of(*values)}}}"  # noqa: E731
        limits += [f"multiple_of={pair(1, 1, 2, 3)}", f"min_keep={pair(0, 1, 2)}", f"max_ratio={pair(1.0, 0.7, 0.5)}"]
    share = of(None, None, 0.0, 0.3, 1.0)
    if share is not None:
        limits += [f"attention={share}", f"attention_from={of(0.0, 0.0, 0.2)}"]
    return f"within({', '.join(limits)}) > {allocation}"


@given(st.integers(0, 10_000), methods(), st.integers(0, 87).map(lambda n: n / 97), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_it_chooses_what_plain_rules_choose(seed, method, ratio, ties):
    problem = drawn(seed, layers=4, heads=4, channels=9, ties=ties)
    expected = plain(problem, ratio, method)
    try:
        keep = problem.chosen(ratio, method)
    except ValueError as refused:
        assert "largest possible ratio" in str(refused)  # noqa: PT017
        assert expected is None
        return
    assert expected is not None
    assert same(keep, expected)
    assert problem.removed(keep) >= ratio * problem.prunable - 1e-6


@given(st.integers(0, 10_000), methods())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_largest_ratio_is_possible_and_the_next_is_not(seed, method):
    problem, (*_, allocation) = drawn(seed), steps_of(method)
    largest = most_removable(problem, allocation, limits_of(method))
    assert problem.removed(problem.chosen(largest, method)) >= largest * problem.prunable - 1e-6
    assume(largest < 0.9999)
    with pytest.raises(ValueError, match=rf"cannot be removed; the largest possible ratio is {largest:.4f} under"):
        problem.chosen(largest + 1e-4, method)


# --- brute force -----------------------------------------------------------------------------------


def best_of_all(problem: Problem, target: int) -> float:
    """Return the lowest sum of scores that any keep-set removes with at least `target` parameters."""
    where = [(n, *map(int, at)) for n in STRUCTURES for at in np.argwhere(problem.existing[n])]
    worth = np.array([problem.scores[n][layer, unit] for n, layer, unit in where])
    costs = np.array([problem.costs[n][layer] for n, layer, _ in where])
    sets = np.array([*itertools.product([0, 1], repeat=len(where))])
    return float((sets @ worth)[sets @ costs >= target].min())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6])
def test_equal_costs_remove_the_least_score_of_all_keep_sets(seed, ratio):
    problem = drawn(seed, layers=2, heads=1, channels=4, costs=(2, 2))
    keep = problem.chosen(ratio, FREE)
    best = best_of_all(problem, math.ceil(ratio * problem.prunable))
    assert problem.lost(keep) == pytest.approx(best, rel=1e-12)
    backwards = Problem({n: -s for n, s in problem.scores.items()}, {"attention": 2, "mlp": 2}, problem.existing)
    assert problem.lost(backwards.chosen(ratio, FREE)) > 1.2 * best, "control"


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_two_costs_stay_within_the_block_that_crosses_the_budget(seed, ratio, ties):
    problem = drawn(seed, layers=2, heads=2, channels=3, ties=ties)
    target = math.ceil(ratio * problem.prunable - 1e-9)
    units = [(problem.scores[n][layer, unit], int(problem.costs[n][layer]))
             for n in STRUCTURES for layer, unit in np.argwhere(problem.existing[n])]  # fmt: skip
    units.sort(key=lambda unit: unit[0] / unit[1])
    crossing = units[int(np.searchsorted(np.cumsum([cost for _, cost in units]), target))][0]
    assert best_of_all(problem, target) - 1e-9 <= problem.lost(problem.chosen(ratio, FREE))
    assert problem.lost(problem.chosen(ratio, FREE)) <= best_of_all(problem, target) + crossing + 1e-9


# --- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [7, 49, 100])
def test_the_ratio_of_whole_units_asks_for_just_these(units):
    """0.07 * 100 is a little over 7, and 1 / 49 * 49 a little under 1."""
    problem = Problem({"attention": np.ones((1, 1)), "mlp": np.arange(1.0, units)[None]}, {"attention": 1, "mlp": 1})
    assert [problem.removed(problem.chosen(n / units, FREE)) for n in range(units)] == [*range(units)]


class TestScores:
    @pytest.mark.parametrize("weight", [-0.5, 0.0, 0.5])
    def test_stable_removes_the_lowest_log_score_plus_weighted_stability(self, weight):
        problem = drawn(3, costs=(2, 2), missing=False)
        keep = problem.chosen(1 / 3, f"stable({weight}) > {FREE}")
        ranked = np.concatenate([(np.log(problem.scores[n]) + weight * problem.stability[n]).ravel()
                                 for n in STRUCTURES])  # fmt: skip
        np.testing.assert_array_equal(
            np.concatenate([keep[n].ravel() for n in STRUCTURES]), ranked > np.sort(ranked)[8]
        )
        assert same(keep, problem.chosen(1 / 3, FREE)) == (not weight)

    def test_structure_mean_makes_structures_comparable(self):
        problem, plain = drawn(0, missing=False), f"{FREE}(by=score)"
        keep, other = (problem.chosen(0.4, f"{before}{plain}") for before in ("normalize > ", ""))
        problem.scores["mlp"] = problem.scores["mlp"] * 1024
        assert same(problem.chosen(0.4, f"normalize > {plain}"), keep)
        assert not same(problem.chosen(0.4, plain), other)

    def test_the_sum_of_a_sub_block_makes_layers_comparable(self):
        problem, plain = drawn(0, missing=False), f"{FREE}(by=score)"
        sums = {name: each / each.sum(axis=1, keepdims=True) for name, each in problem.scores.items()}
        of_sums = Problem(sums, {"attention": 7, "mlp": 2}).chosen(0.4, plain)
        for name in STRUCTURES:
            problem.scores[name][1] *= 1024
        assert same(problem.chosen(0.4, f"normalize(within=sub_block) > {plain}"), of_sums)
        assert not same(problem.chosen(0.4, f"normalize > {plain}"), of_sums)

    def test_ranks_remove_as_large_a_share_of_each_structure(self):
        """Whatever the scores of a structure are, of any sign; by the rank in each sub-block also of each layer."""
        problem = drawn(4, layers=4, heads=4, channels=8, missing=False)
        problem.scores = {"attention": problem.scores["attention"] - 1e3, "mlp": problem.scores["mlp"]}
        keep = problem.chosen(0.5, f"normalize(to=ranks) > {FREE}(by=score)")
        for name, units in keep.items():
            lowest = np.sort(problem.scores[name].ravel())[units.size // 2]
            np.testing.assert_array_equal(units, problem.scores[name] >= lowest)
        each = problem.chosen(0.5, f"normalize(within=sub_block, to=ranks) > {FREE}(by=score)")
        assert all((units.sum(axis=1) == units.shape[1] // 2).all() for units in each.values())
        assert not same(each, keep)
        assert problem.chosen(0.5, f"{FREE}(by=score)")["mlp"].all(), "control"

    def test_ranks_by_hand(self):
        """The share of units with no larger a score; equal ones share theirs, and what is gone has none."""
        gone = {"attention": np.zeros((1, 1), bool), "mlp": np.array([[False, False, True], [False, False, False]])}
        problem = Problem({"attention": [[3.0]], "mlp": [[2.0, 2.0, 9.0], [1.0, 5.0, 4.0]]}, {"attention": 1, "mlp": 1})
        keep = {name: ~each for name, each in gone.items()}
        state = State(
            problem,
            keep,
            Within(),
            scores={**problem.scores, "mlp": np.where(gone["mlp"], np.nan, problem.scores["mlp"])},
        )
        on = Context(dense=problem, scenarios={}, ratio=0.5, final=0.5)
        found = {
            each: Normalize(within=each, to="ranks")(state, on).scores["mlp"] for each in ("structure", "sub_block")
        }
        np.testing.assert_allclose(found["structure"], [[0.6, 0.6, np.nan], [0.2, 1.0, 0.8]])
        np.testing.assert_allclose(found["sub_block"], [[1.0, 1.0, np.nan], [1 / 3, 1.0, 2 / 3]])

    @pytest.mark.parametrize(
        ("method", "broken", "said"),
        [
            (f"stable > {FREE}", {"stability": None}, "expected a stability indicator over two examples or more"),
            (f"stable > {FREE}", {"mlp": -1.0}, "got -1 for mlp unit 2 in layer 1"),
            (f"normalize > {FREE}", {"mlp": None}, "scores of mlp with a mean above 0, got 0"),
            (FREE, {"mlp": np.nan}, "scores of mlp unit 2 in layer 1 are not finite"),
            (FREE, {"mlp": np.inf}, "scores of mlp unit 2 in layer 1 are not finite"),
            (FREE, {"mlp": "shape"}, r"expected mlp scores of \(3, 6\), got \(3, 5\)"),
            (FREE, {"mlp": "missing"}, "structure mlp has no scores"),
        ],
    )
    def test_scores_that_do_not_do_are_refused(self, method, broken, said):
        problem = drawn(0, missing=False)
        if "stability" in broken:
            problem.stability = None
        elif (value := broken["mlp"]) == "missing":
            del problem.scores["mlp"]
        elif value is None or value == "shape":
            problem.scores["mlp"] = problem.scores["mlp"][:, 1:] if value else 0 * problem.scores["mlp"]
        else:
            problem.scores["mlp"][1, 2] = value
        with pytest.raises(ValueError, match=said):
            problem.chosen(0.2, method)

    def test_scores_of_units_that_are_missing_are_not_read_and_jax_arrays_are(self):
        problem = drawn(0)
        want = problem.chosen(0.3, FREE)
        problem.scores = {n: jnp.where(problem.existing[n], jnp.asarray(s, jnp.float32), jnp.nan)
                          for n, s in problem.scores.items()}  # fmt: skip
        assert same(problem.chosen(0.3, FREE), want)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan"), float("inf")])
def test_ratios_that_are_none_are_refused(ratio):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        drawn(0).chosen(ratio, FREE)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("within(protect=(3,)) > global", r"expected layers in \[-3, 3\) of this model, got 3"),
        ("within(protect=(0, 1, 2)) > uniform", r"largest possible ratio is 0\.0000"),
        ("within(depth=True) > uniform", "within.depth: expected a ranking of all units behind it, global, got uni"),
        ("within(depth=True) > global", r"largest possible ratio is 0\.0000 under min_keep"),
        ("within(depth=True, whole_layers=True, min_keep={mlp: 0}) > global", "whole_layers: expected min_keep 0"),
    ],
)
def test_limits_that_do_not_do_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        drawn(0).chosen(0.2, method)


def test_a_share_of_the_layers_is_left_alone():
    """By hand, at depths of models that there are; of 32 layers what LLM-Pruner says by number."""
    for depth, first, last in ((32, 4, 2), (30, 4, 2), (18, 2, 1), (12, 2, 1), (3, 0, 0)):
        by_hand = np.isin(np.arange(depth), [*range(first), *range(depth - last, depth)])
        np.testing.assert_array_equal(protected((0.13, -0.07), depth), by_hand)
    np.testing.assert_array_equal(protected((0.5, 17), 18).nonzero()[0], [*range(9), 17])
    assert not protected((0.0, -0.0), 18).any()


def test_alike_leaves_layers_of_one_shape_alike():
    """At ratios that whole blocks do not meet; control: otherwise some layers are a block wider, never one narrower."""
    problem = drawn(0, layers=6, heads=3, channels=40, missing=False)
    for ratio in (0.1, 0.23, 0.4):
        limits = "within(max_ratio={attention: 0}, multiple_of={mlp: 8})"
        (width,) = {*problem.chosen(ratio, f"{limits} > uniform(alike=True)")["mlp"].sum(1).tolist()}
        others = {*problem.chosen(ratio, f"{limits} > uniform")["mlp"].sum(1).tolist()}
        assert width in others
        assert others == {width, width + 8}


@pytest.mark.parametrize(("ratio", "share"), [(0.2, 0.0), (0.3, 0.0), (0.4, 0.0625), (0.5, 0.1)])
def test_attention_gives_its_share_of_the_rest(ratio, share):
    """A quarter of what goes beyond 30 %, of units of one parameter each, so that it is met exactly."""
    problem = drawn(0, layers=4, heads=50, channels=50, costs=(1, 1), missing=False)
    keep = problem.chosen(ratio, "within(attention=0.25, attention_from=0.3) > global(by=score)")
    assert (~keep["attention"]).sum() == round(share * ratio * 400)
    assert (~keep["mlp"]).sum() == round((1 - share) * ratio * 400)
    plain = problem.chosen(ratio, "within(attention=0.25) > global(by=score)")
    assert (~plain["attention"]).sum() == 100 * ratio, "control"


def test_a_single_unit_a_layer_leaves_all_to_the_mlp():
    """As `saap prune` meets a model with one KV head; with two of them the share is met."""
    for heads in (1, 2):
        problem = drawn(0, layers=4, heads=heads, channels=10, costs=(5, 1), missing=False)
        keep = problem.chosen(0.25, "within(attention=0.5) > uniform")
        assert keep["attention"].all() == (heads == 1)
        assert most_removable(problem, Uniform(), Within(attention=0.5)) > 0.25


def test_layers_with_a_single_head_leave_attentions_share_to_the_others():
    """As a pruned model is pruned again; control: a layer that is to lose as much as the others cannot."""
    problem = drawn(0, layers=4, heads=3, channels=10, costs=(5, 1), missing=False)
    problem.existing["attention"] = np.arange(3) < np.array([[3], [1], [2], [0]])
    keep = problem.chosen(0.4, "within(attention=0.25) > uniform")
    lost = (problem.existing["attention"] & ~keep["attention"]).sum(axis=1)
    assert lost.any()
    assert not lost[[1, 3]].any()
    with pytest.raises(ValueError, match="ratio: 0.4 of the prunable parameters cannot be removed"):
        problem.chosen(0.4, "within(max_ratio={mlp: 0.3}) > uniform")


@given(seed=st.integers(0, 1000), method=st.sampled_from([
    FREE, f"stable(0.5) > {FREE}(by=score)", "within(min_keep=0, attention=0.5, attention_from=0.2) > global",
    "within(min_keep=0) > uniform"]))  # fmt: skip
@settings(max_examples=30, deadline=None, derandomize=True)
def test_what_is_gone_goes_first_and_its_scores_are_not_read(seed, method):
    problem, rng = drawn(seed, missing=False), np.random.default_rng(seed)
    gone = {name: ~kept for name, kept in problem.chosen(0.2, method).items()}
    # importance has changed since, and nothing is known of what is gone
    problem.scores = {n: np.where(gone[n], np.nan, rng.lognormal(0, 1, gone[n].shape)) for n in STRUCTURES}
    problem.stability = {n: np.where(gone[n], np.nan, problem.stability[n]) for n in STRUCTURES}
    keep = problem.chosen(0.5, method, gone)
    assert problem.removed(keep) >= 0.5 * problem.prunable * (1 - 1e-9)
    assert not any((keep[n] & gone[n]).any() for n in STRUCTURES)
    if "attention" not in method and "uniform" not in method:
        before = sum(int((gone[n].sum(1) * problem.costs[n]).sum()) for n in STRUCTURES)
        share = (0.5 * problem.prunable - before) / (problem.prunable - before)
        problem.existing = {n: problem.existing[n] & ~gone[n] for n in STRUCTURES}
        assert same(problem.chosen(share, method), keep)


def test_shares_by_scores_do_not_read_those_of_what_is_gone():
    problem, method = drawn(0, channels=40, missing=False), "softmax(0.5)"
    gone = {name: ~kept for name, kept in problem.chosen(0.2, "uniform").items()}
    kept = []
    for known in (np.nan, 99.0):
        problem.scores = {name: np.where(gone[name], known, each) for name, each in problem.scores.items()}
        kept.append(problem.chosen(0.5, method, gone))
    assert same(*kept)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_of_whole_layers_those_of_the_lowest_mean_go(seed, ratio):
    method = "within(depth=True, whole_layers=True, min_keep=0) > global(by=score)"
    problem = drawn(seed, layers=6, missing=False)
    keep, means = problem.chosen(ratio, method), sum(problem.scores[name].mean(axis=1) for name in STRUCTURES)
    gone = np.isin(np.arange(6), np.argsort(means)[: math.ceil(6 * ratio)])
    for kept in keep.values():
        np.testing.assert_array_equal(kept, np.broadcast_to(~gone[:, None], kept.shape))
    problem.existing["mlp"][0], problem.existing["attention"][1] = False, False  # a layer goes by what it has
    problem.scores = {n: np.where(units, np.arange(6.0)[:, None], np.nan) for n, units in problem.existing.items()}
    keep = problem.chosen(1e-6, method)
    assert not keep["attention"][0].any()
    assert keep["mlp"][1:].all()


class TestShares:
    """What each layer loses."""

    def test_log_starts_above_0_where_it_has_to(self):
        """Three layers of 100 that lose 80 at most: r + c log(layer + 1), by hand."""
        size, most = np.full(3, 100), np.full(3, 80.0)
        logs = np.log([1, 2, 3])
        np.testing.assert_array_equal(shares_of(Log(), size, np.ones(3), most, 120), 100 * logs / (100 * logs).sum())
        met = shares_of(Log(), size, np.ones(3), most, 180) * 180  # without r the last one loses 180 · 0.613 = 110
        c = (80 - 60) / (logs[2] - logs.mean())  # the last is at 80, and the mean at 60
        np.testing.assert_allclose(met, 60 + c * (logs - logs.mean()), rtol=1e-12)
        assert met[0] > 0

    def test_log_prunes_half_of_layers_with_one_head(self):
        """18 layers of one head, which stays, and 2,048 channels: with r = 0 the last would lose 71.5 % of 70.6 %."""
        head, channel = 640 * 256 * 10, 3 * 640
        scores = {"attention": np.ones((18, 1)), "mlp": np.random.default_rng(0).random((18, 2048))}
        problem = Problem(scores, {"attention": head, "mlp": channel})
        gone = (~problem.chosen(0.5, "log")["mlp"]).sum(axis=1)
        assert gone[-1] == 2047
        assert 0 < gone[0] < 200
        assert (np.diff(gone) >= 0).all()
        layer, logs = head + 2048 * channel, np.log(np.arange(1, 19))
        r = 0.5 - (2047 * channel / layer - 0.5) * logs.mean() / (logs[-1] - logs.mean())
        assert gone[0] * channel / layer == pytest.approx(r, abs=channel / layer)
        fewer = (~problem.chosen(0.49, "log")["mlp"]).sum(axis=1)
        assert fewer[0] == 0, "control: where 0 suffices it is 0"
        assert most_removable(problem, Log(), Within()) == int(2047 * channel / layer * 10_000) / 10_000

    @pytest.mark.parametrize(("ratio", "temperature", "bound"), [(0.2, 1.0, 0), (0.5, 0.3, 1), (0.6, 0.05, 3)])
    def test_softmax_gives_what_its_problem_is_solved_by(self, ratio, temperature, bound):
        """max Σ s (1 - φ) + ε Σ -φ log φ with a given mean of φ and φ <= 1, by another solver."""
        scores = np.array([0.9, 0.2, 0.5, 0.1, 0.7, 0.3])
        given = {"mlp": np.broadcast_to(scores[:, None], (6, 2000)), "attention": np.zeros((6, 0))}
        problem = Problem(given, {"mlp": 3, "attention": 0})
        made, flat = (choose(problem, given, ratio, Softmax(each), Within(min_keep=0)).keep["mlp"]
                      for each in (temperature, 1e6))  # fmt: skip
        solved = minimize(
            lambda phi: -(scores * (1 - phi)).sum() + temperature * (phi * np.log(phi)).sum(),
            np.full(6, ratio),
            bounds=[(1e-9, 1)] * 6,
            constraints={"type": "eq", "fun": lambda phi: phi.mean() - ratio},
            options={"ftol": 1e-12, "maxiter": 1000},
            method="SLSQP",
        )
        gone = 1 - made.mean(axis=1)
        np.testing.assert_allclose(gone, solved.x, atol=2e-3)
        assert (gone == 1).sum() == bound
        assert np.ptp(flat.sum(axis=1)) <= 1 < np.ptp(made.sum(axis=1))

    def test_shares_and_priorities_of_somebody_else_decide_the_widths(self):
        @dataclasses.dataclass(frozen=True)
        class Last(Allocation):
            name = "last"

            def shares(self, size, scores):
                return size * [0, 0, 1] / size[-1]

        class Backwards(Global):
            def priority(self, scores):
                return {name: -values for name, values in scores.items()}

        scores = {"attention": np.ones((3, 4)), "mlp": np.arange(1.0, 31).reshape(3, 10)}
        problem = Problem(scores, {"attention": 10, "mlp": 4})

        def kept(allocation: Allocation) -> list[int]:
            return choose(problem, scores, 0.1, allocation, Within(attention=0.0)).keep["mlp"].sum(axis=1).tolist()

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
            shares_of(Wrong(), np.array([1, 0, 2]), np.ones(3), np.ones(3), 1)


# --- structures of traced models: copies lose as many units each -----------------------------------

COPIES, UNITS, COSTS = (3, 1, 2), (4, 5, 6), {"up[1]": 5, "heads": 7, "wide.2": 3}
LIMITS = {"up[1]": Limits(), "heads": Limits(max_ratio=0.5), "wide.2": Limits(min_keep=2, multiple_of=2)}


def traced(seed: int, own=None, units=UNITS) -> Problem:
    random = np.random.default_rng(seed)
    scores = {name: random.lognormal(0, 1, shape) for name, *shape in zip(COSTS, COPIES, units, strict=True)}
    return Problem(scores, COSTS, own=own or LIMITS)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45])
def test_copies_lose_as_many_units_and_near_the_least_score(seed, ratio):
    """Of all widths, within the largest block; the highest scores of each copy stay."""
    problem, best = traced(seed), np.inf
    keep = choose(problem, problem.scores, ratio, Global(), Within()).keep
    for gone in itertools.product([0, 1, 2, 3], [0, 1, 2], [0, 2, 4]):
        names = dict(zip(COSTS, gone, strict=True))
        lost = sum(np.sort(problem.scores[name], 1)[:, :n].sum() for name, n in names.items())
        if sum(n * problem.costs[name].sum() for name, n in names.items()) >= ratio * problem.prunable:
            best = min(best, lost)
    largest = max(np.sort(each, 1)[:, :4].sum() for each in problem.scores.values())
    assert best - 1e-9 <= problem.lost(keep) <= best + largest
    assert problem.removed(keep) >= ratio * problem.prunable
    for name, kept in keep.items():
        assert len(counts := set(kept.sum(1).tolist())) == 1
        for row, values in zip(kept, problem.scores[name], strict=True):
            assert set(np.flatnonzero(row)) == set(np.argsort(values)[len(values) - min(counts) :])
    assert keep["heads"].sum() >= 3
    assert keep["wide.2"].sum(1)[0] in (2, 4, 6)


def test_uniform_takes_the_same_share_of_each_structure():
    problem = traced(0, dict.fromkeys(COSTS, Limits()), units=(20, 40, 10))
    problem.scores = {name: each * COSTS[name] ** 3 for name, each in problem.scores.items()}
    kept, other = ({name: int(each.sum(1)[0]) for name, each in
                    choose(problem, problem.scores, 0.3, allocation, Within()).keep.items()}
                   for allocation in (Uniform(), Global()))  # fmt: skip
    assert kept == {"up[1]": 14, "heads": 28, "wide.2": 7} != other


def test_copies_lose_as_many_units_where_a_structure_has_limits_of_its_own_alone():
    """Control: layers lose other numbers of them. One layer is a structure of one copy."""
    scores = {"attention": np.ones((2, 2)), "mlp": np.array([[1.0, 2, 3, 4], [10, 20, 30, 40]])}
    for own, kept in ((None, [2, 4]), ({"attention": Limits(max_ratio=0.0), "mlp": Limits()}, [3, 3])):
        problem = Problem(scores, {"attention": 1, "mlp": 1}, own=own)
        found = choose(problem, problem.scores, 2 / 12, Global(), Within(max_ratio={"attention": 0.0}))
        assert found.keep["mlp"].sum(1).tolist() == kept
    one, within = drawn(0, layers=1, heads=6, channels=9), Within(min_keep={"attention": 2}, multiple_of={"mlp": 3})
    own = {"attention": Limits(min_keep=2), "mlp": Limits(multiple_of=3)}
    for ratio in (0.0, 0.2, 0.5):
        plain, named = (
            choose(Problem(one.scores, {"attention": 7, "mlp": 2}, own=each), one.scores, ratio, Global(), within).keep
            for each in (None, own)
        )
        assert same(plain, named)


@pytest.mark.parametrize("allocation", [Uniform(), Global()])
def test_the_largest_ratio_of_structures_is_the_largest(allocation):
    problem = traced(0)
    top = most_removable(problem, allocation, Within())
    choose(problem, problem.scores, top, allocation, Within())
    with pytest.raises(ValueError, match="the largest possible ratio"):
        choose(problem, problem.scores, top + 0.01, allocation, Within())
    nothing = traced(0, dict.fromkeys(COSTS, Limits(max_ratio=0.0)))
    assert most_removable(nothing, allocation, Within()) == 0
