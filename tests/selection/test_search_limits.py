"""The search over structures that are no layers': copies lose as many units, each structure has its own limits."""

import itertools

import numpy as np
import pytest
from saap_jax.config.search import PerStructure, SearchConfig, SharePerStructure
from saap_jax.selection.search import Limits, largest_ratio, search

GLOBAL = SearchConfig(allocation="global")
COSTS = {"up[1]": np.full(3, 5), "heads": np.full(1, 7), "wide.2": np.full(2, 3)}
UNITS = {"up[1]": 4, "heads": 5, "wide.2": 6}
EXISTING = {name: np.ones((len(COSTS[name]), units), bool) for name, units in UNITS.items()}
LIMITS = {"up[1]": Limits(), "heads": Limits(max_ratio=0.5), "wide.2": Limits(min_keep=2, multiple_of=2)}
PRUNABLE = sum(EXISTING[name].sum() * COSTS[name][0] for name in UNITS)


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
        best = min(best, lost if removed >= ratio * PRUNABLE else np.inf)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45])
def test_copies_lose_as_many_units_and_the_exact_solver_finds_the_optimum(seed, ratio):
    scores = drawn(seed)
    for solver in ("greedy", "exact"):
        config = SearchConfig(allocation="global", solver=solver)
        selection = search(scores, COSTS, EXISTING, ratio, config, limits=LIMITS)
        lost = 0.0
        for name, kept in selection.keep.items():
            assert len(set(kept.sum(1))) == 1
            count = int(kept.sum(1)[0])
            for row, values in zip(kept, scores[name], strict=True):  # the highest scores of each copy stay
                assert set(np.flatnonzero(row)) == set(np.argsort(values)[UNITS[name] - count :])
            lost += scores[name][~kept].sum()
        assert selection.removed >= ratio * PRUNABLE
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
    config = SearchConfig(allocation="global", max_ratio=SharePerStructure(attention=0.0))
    assert search(scores, costs, existing, 2 / 12, config).keep["mlp"].sum(1).tolist() == [2, 4]
    own = {"attention": Limits(max_ratio=0.0), "mlp": Limits()}
    assert search(scores, costs, existing, 2 / 12, config, limits=own).keep["mlp"].sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("allocation", ["uniform", "global", "adaptive"])
def test_one_layer_with_its_limits_is_a_structure_of_one_copy(allocation):
    random = np.random.default_rng(0)
    scores = {"attention": random.lognormal(0, 1, (1, 6)), "mlp": random.lognormal(0, 1, (1, 9))}
    existing = {name: np.ones(values.shape, bool) for name, values in scores.items()}
    costs = {"attention": np.full(1, 7), "mlp": np.full(1, 3)}
    stability = {name: random.normal(size=values.shape) for name, values in scores.items()}
    config = SearchConfig(
        allocation=allocation, min_keep=PerStructure(attention=2, mlp=1), multiple_of=PerStructure(attention=1, mlp=3)
    )
    limits = {"attention": Limits(min_keep=2), "mlp": Limits(multiple_of=3)}
    for ratio in (0.0, 0.2, 0.5):
        plain = search(scores, costs, existing, ratio, config, stability)
        named = search(scores, costs, existing, ratio, config, stability, limits=limits)
        for name in scores:
            if allocation == "uniform":  # one layer shares its budget between both, structures have their own
                assert named.keep[name].sum() >= min(plain.keep[name].sum(), (1 - ratio) * scores[name].size - 3)
            else:
                np.testing.assert_array_equal(plain.keep[name], named.keep[name])


def test_uniform_takes_the_same_share_of_each_structure():
    limits = dict.fromkeys(UNITS, Limits())
    units = {"up[1]": 20, "heads": 40, "wide.2": 10}
    existing = {name: np.ones((len(COSTS[name]), count), bool) for name, count in units.items()}
    random = np.random.default_rng(0)
    scores = {name: random.lognormal(0, 1, each.shape) * COSTS[name][0] ** 3 for name, each in existing.items()}
    kept = search(scores, COSTS, existing, 0.3, SearchConfig(allocation="uniform"), limits=limits).keep
    assert {name: int(each.sum(1)[0]) for name, each in kept.items()} == {"up[1]": 14, "heads": 28, "wide.2": 7}
    other = search(scores, COSTS, existing, 0.3, GLOBAL, limits=limits).keep
    assert {name: int(each.sum(1)[0]) for name, each in other.items()} != {"up[1]": 14, "heads": 28, "wide.2": 7}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_largest_ratio_is_the_largest(allocation):
    config, scores = SearchConfig(allocation=allocation), drawn(0)
    top = largest_ratio(COSTS, EXISTING, config, LIMITS)
    search(scores, COSTS, EXISTING, top, config, limits=LIMITS)
    with pytest.raises(ValueError, match="the largest possible ratio"):
        search(scores, COSTS, EXISTING, top + 0.01, config, limits=LIMITS)


def test_nothing_can_go():
    nothing = dict.fromkeys(UNITS, Limits(max_ratio=0.0))
    for allocation in ("uniform", "global"):
        assert largest_ratio(COSTS, EXISTING, SearchConfig(allocation=allocation), nothing) == 0
