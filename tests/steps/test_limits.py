"""The search over structures that are no layers': copies lose as many units, each structure has its own limits."""

import itertools

import numpy as np
import pytest

from saap_jax.steps.allocation.ranking import Global
from saap_jax.steps.allocation.search import Prunable, largest_ratio, search
from saap_jax.steps.allocation.uniform import Uniform
from saap_jax.steps.limits import Within
from saap_jax.types import Limits

COSTS = {"up[1]": np.full(3, 5), "heads": np.full(1, 7), "wide.2": np.full(2, 3)}
UNITS = {"up[1]": 4, "heads": 5, "wide.2": 6}
EXISTING = {name: np.ones((len(COSTS[name]), units), bool) for name, units in UNITS.items()}
LIMITS = {"up[1]": Limits(), "heads": Limits(max_ratio=0.5), "wide.2": Limits(min_keep=2, multiple_of=2)}
PRUNABLE = Prunable(COSTS, EXISTING, LIMITS)
TOTAL = sum(EXISTING[name].sum() * COSTS[name][0] for name in UNITS)


def drawn(seed):
    random = np.random.default_rng(seed)
    return {name: random.lognormal(0, 1, units.shape) for name, units in EXISTING.items()}


def least(scores, ratio):
    """Return the smallest score that can be removed, over all widths: each copy loses its lowest units."""
    widths = {"up[1]": [0, 1, 2, 3], "heads": [0, 1, 2], "wide.2": [0, 2, 4]}
    best = np.inf
    for gone in itertools.product(*widths.values()):
        removed = sum(n * COSTS[name].sum() for name, n in zip(widths, gone, strict=True))
        lost = sum(np.sort(scores[name], 1)[:, :n].sum() for name, n in zip(widths, gone, strict=True))
        best = min(best, lost if removed >= ratio * TOTAL else np.inf)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45])
def test_copies_lose_as_many_units_and_the_exact_solver_finds_the_optimum(seed, ratio):
    scores = drawn(seed)
    for solver in ("greedy", "exact"):
        selection = search(scores, PRUNABLE, ratio, Global(solver=solver), Within())
        lost = 0.0
        for name, kept in selection.keep.items():
            assert len(set(kept.sum(1))) == 1
            count = int(kept.sum(1)[0])
            for row, values in zip(kept, scores[name], strict=True):  # the highest scores of each copy stay
                assert set(np.flatnonzero(row)) == set(np.argsort(values)[UNITS[name] - count :])
            lost += scores[name][~kept].sum()
        assert selection.removed >= ratio * TOTAL
        assert selection.removed == sum((~k).sum() * COSTS[n][0] for n, k in selection.keep.items())
        assert selection.keep["heads"].sum() >= 3
        assert selection.keep["wide.2"].sum(1)[0] in (2, 4, 6)
        assert lost >= least(scores, ratio) - 1e-9
        if solver == "exact":
            np.testing.assert_allclose(lost, least(scores, ratio))


def test_without_limits_copies_lose_different_numbers():
    scores = {"attention": np.ones((2, 2)), "mlp": np.array([[1.0, 2, 3, 4], [10, 20, 30, 40]])}
    existing = {name: np.ones(values.shape, bool) for name, values in scores.items()}
    costs = {name: np.ones(2, np.int64) for name in scores}
    own = {"attention": Limits(max_ratio=0.0), "mlp": Limits()}
    for limits, kept in ((None, [2, 4]), (own, [3, 3])):
        within = Within(max_ratio={"attention": 0.0})
        found = search(scores, Prunable(costs, existing, limits), 2 / 12, Global(), within)
        assert found.keep["mlp"].sum(1).tolist() == kept


@pytest.mark.parametrize("allocation", [Uniform(), Global()])
def test_one_layer_with_its_limits_is_a_structure_of_one_copy(allocation):
    random = np.random.default_rng(0)
    scores = {"attention": random.lognormal(0, 1, (1, 6)), "mlp": random.lognormal(0, 1, (1, 9))}
    existing = {name: np.ones(values.shape, bool) for name, values in scores.items()}
    costs = {"attention": np.full(1, 7), "mlp": np.full(1, 3)}
    within = Within(min_keep={"attention": 2}, multiple_of={"mlp": 3})
    limits = {"attention": Limits(min_keep=2), "mlp": Limits(multiple_of=3)}
    for ratio in (0.0, 0.2, 0.5):
        plain, named = (
            search(scores, Prunable(costs, existing, each), ratio, allocation, within) for each in (None, limits)
        )
        for name in scores:
            if allocation == Uniform():  # one layer shares its budget between both, structures have their own
                assert named.keep[name].sum() >= min(plain.keep[name].sum(), (1 - ratio) * scores[name].size - 3)
            else:
                np.testing.assert_array_equal(plain.keep[name], named.keep[name])


def test_uniform_takes_the_same_share_of_each_structure():
    limits = dict.fromkeys(UNITS, Limits())
    units = {"up[1]": 20, "heads": 40, "wide.2": 10}
    existing = {name: np.ones((len(COSTS[name]), count), bool) for name, count in units.items()}
    random = np.random.default_rng(0)
    scores = {name: random.lognormal(0, 1, each.shape) * COSTS[name][0] ** 3 for name, each in existing.items()}
    prunable = Prunable(COSTS, existing, limits)
    kept = search(scores, prunable, 0.3, Uniform(), Within()).keep
    assert {name: int(each.sum(1)[0]) for name, each in kept.items()} == {"up[1]": 14, "heads": 28, "wide.2": 7}
    other = search(scores, prunable, 0.3, Global(), Within()).keep
    assert {name: int(each.sum(1)[0]) for name, each in other.items()} != {"up[1]": 14, "heads": 28, "wide.2": 7}


@pytest.mark.parametrize("allocation", [Uniform(), Global()])
def test_the_largest_ratio_is_the_largest(allocation):
    top = largest_ratio(PRUNABLE, allocation, Within())
    search(drawn(0), PRUNABLE, top, allocation, Within())
    with pytest.raises(ValueError, match="the largest possible ratio"):
        search(drawn(0), PRUNABLE, top + 0.01, allocation, Within())
    nothing = PRUNABLE._replace(limits=dict.fromkeys(UNITS, Limits(max_ratio=0.0)))
    assert largest_ratio(nothing, allocation, Within()) == 0
