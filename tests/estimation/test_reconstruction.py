"""Costs of removal with the rest refitted, against least squares solved anew for every set of units that goes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from saap_jax.estimation.base import Statistics
from saap_jax.estimation.reconstruction import SECOND_MOMENT, _ascending, greedy_costs, leverages, single_costs, swapped
from saap_jax.estimation.registry import make_estimator
from saap_jax.structures.weights import weights_of
from tests.helpers import dense_model
from tests.in_sequence import matrices, swapped_by_hand


@pytest.fixture
def problem(x64):
    """Correlated activations of 6 units with 2 coordinates, and an output matrix: weight, G, λ, activations."""
    random = np.random.default_rng(3)
    active = random.standard_normal((40, 4)) @ random.standard_normal((4, 12)) + 0.3 * random.standard_normal((40, 12))
    return random.standard_normal((6, 2, 5)), active.T @ active / 40, 0.05, active


def fitted(weight, moment, ridge, gone: list[int]) -> tuple[float, np.ndarray]:
    """Return the least of ½ tr (W - W')ᵀ H (W - W') over W' that are 0 in the rows of some units, and that W'."""
    units, coordinates, embed = weight.shape
    flat, system = weight.reshape(-1, embed), moment + ridge * np.eye(len(moment))
    kept = ~np.repeat(np.isin(np.arange(units), gone), coordinates)
    new = np.zeros_like(flat)
    new[kept] = np.linalg.solve(system[np.ix_(kept, kept)], system[kept] @ flat)
    change = flat - new
    return 0.5 * float(np.sum(change * (system @ change))), new


def test_a_single_cost_is_what_least_squares_leaves(problem):
    weight, moment, ridge, _ = problem
    costs = np.asarray(single_costs(*map(jnp.asarray, (weight, moment, ridge))))
    np.testing.assert_allclose(costs, [fitted(weight, moment, ridge, [unit])[0] for unit in range(6)], rtol=1e-9)


def test_greedy_costs_are_those_of_ever_smaller_problems(problem):
    """Brute force: the next to go is the one whose loss leaves least, all others fitted anew each time."""
    weight, moment, ridge, _ = problem
    scores = np.asarray(greedy_costs(*map(jnp.asarray, (weight, moment, ridge))))
    gone, last, highest = [], 0.0, 0.0
    while len(gone) < 6:
        left = [unit for unit in range(6) if unit not in gone]
        totals = {unit: fitted(weight, moment, ridge, [*gone, unit])[0] for unit in left}
        unit = min(left, key=totals.get)
        highest = max(highest, totals[unit] - last)
        np.testing.assert_allclose(scores[unit], highest, rtol=1e-8)
        gone, last = [*gone, unit], totals[unit]
    single = np.asarray(single_costs(*map(jnp.asarray, (weight, moment, ridge))))
    assert np.argsort(scores).tolist() != np.argsort(single).tolist()  # correlated units stand in for each other
    assert np.argsort(scores).tolist() == gone
    assert len(set(scores.tolist())) == 6


def test_greedy_leaves_less_than_single_costs(problem):
    weight, moment, ridge, _ = problem
    orders = [
        np.argsort(np.asarray(f(*map(jnp.asarray, (weight, moment, ridge))))) for f in (greedy_costs, single_costs)
    ]
    left = [[fitted(weight, moment, ridge, order[:n].tolist())[0] for n in (2, 3)] for order in orders]
    best = [min(fitted(weight, moment, ridge, list(s))[0] for s in itertools.combinations(range(6), n)) for n in (2, 3)]
    assert all(a <= b for a, b in zip(*left, strict=True))
    assert all(a <= 1.5 * b for a, b in zip(left[0], best, strict=True))


@pytest.mark.slow
def test_swaps_are_those_of_sets_that_are_fitted_anew(x64):
    moved = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        coordinates = 1 + seed % 3
        size = 6 * coordinates
        active = random.standard_normal((50, 4)) @ random.standard_normal((4, size))
        active += 0.3 * random.standard_normal((50, size))
        weight, moment = random.standard_normal((6, coordinates, 5)), active.T @ active / 50
        start = set(random.permutation(6)[: 2 + seed % 3].tolist())
        mask = np.isin(np.arange(6), sorted(start))
        kept = np.asarray(swapped(*map(jnp.asarray, (weight, moment, 0.05, mask))))
        assert set(np.flatnonzero(kept).tolist()) == swapped_by_hand(weight, moment, 0.05, start), seed
        before, after = (fitted(weight, moment, 0.05, np.flatnonzero(~each).tolist())[0] for each in (mask, kept))
        assert after <= before
        moved += bool((kept != mask).any())
    assert moved > 6, "control: starts at random are left"


@pytest.mark.parametrize("kept", [[True] * 6, [False] * 6])
def test_nothing_is_swapped_where_all_stay_or_go(problem, kept):
    weight, moment, ridge, _ = problem
    assert np.asarray(swapped(*map(jnp.asarray, (weight, moment, ridge, np.array(kept))))).tolist() == kept


@pytest.mark.parametrize("block", [1, 2, 3, 5, 12])
def test_costs_of_blocks_add_up_to_that_of_removing_all(problem, block):
    """Channels that stand in for each other cost little alone and much together: here two are nearly the same."""
    weight, moment, ridge, active = problem
    active[:, 1] = active[:, 0] + 1e-3 * active[:, 1]
    flat, moment = weight.reshape(12, 1, 5), active.T @ active / 40
    scores = np.asarray(greedy_costs(*map(jnp.asarray, (flat, moment, ridge)), block=block))
    whole, _ = fitted(flat, moment, ridge, list(range(12)))
    np.testing.assert_allclose(scores.sum(), whole, rtol=1e-9)
    single = np.asarray(single_costs(*map(jnp.asarray, (flat, moment, ridge))))
    assert single.sum() < 0.7 * whole, "control: alone they cost less"
    first = np.argsort(scores)[:block]
    assert block == 1 or set(first) == set(np.argsort(single)[:block])
    together, _ = fitted(flat, moment, ridge, first.tolist())
    assert scores[first].sum() <= together * (1 + 1e-9), "as much, or shared with dearer ones behind"
    assert len(set(scores.tolist())) == 12


def test_values_that_descend_are_an_isotonic_regression(x64):
    values = np.random.default_rng(0).standard_normal(40) + np.linspace(0, 2, 40)
    assert (np.diff(values) < 0).any(), "control: they descend"
    np.testing.assert_allclose(np.asarray(_ascending(jnp.asarray(values))), isotonic_regression(values).x, rtol=1e-9)


def test_no_leverage_is_below_zero():
    """Of units that are never active, in float32, whose exact leverage is 0."""
    random = np.random.default_rng(0)
    for ridge in np.geomspace(1e-3, 1e2, 40):
        active = np.float32(random.standard_normal((40, 12))) * (np.arange(12) < 7)
        moment = jnp.asarray(active.T @ active / 40)
        found = np.asarray(leverages(jnp.zeros((12, 1, 5), jnp.float32), moment, jnp.float32(ridge)))
        assert (found >= 0).all()
        assert found[7:].max() < 1e-5 < found[:7].min(), "control"


def test_leverage_is_the_diagonal_of_the_ridge_projection(problem):
    weight, moment, ridge, _ = problem
    projection = moment @ np.linalg.inv(moment + ridge * np.eye(12))
    got = np.asarray(leverages(*map(jnp.asarray, (weight, moment, ridge))))
    np.testing.assert_allclose(got, np.diag(projection).reshape(6, 2).sum(1), rtol=1e-9)


@pytest.mark.parametrize("name", ["leverage", "obs", "obs(greedy=False)"])
def test_units_of_a_layer_that_is_never_active_are_worth_nothing(name):
    sizes = {"attention": 16, "mlp": 6}
    moments = {name: jnp.stack([jnp.eye(size), jnp.zeros((size, size))]) for name, size in sizes.items()}
    statistics = Statistics(jnp.asarray(1), jnp.asarray(9), jnp.zeros(1), {SECOND_MOMENT: moments})
    for values in make_estimator(name).score(statistics, weights_of(dense_model())).values():
        assert (values[0] > 0).all(), "control"
        assert not values[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leverage", "obs(greedy=False)"])
def test_estimators_have_a_ridge_of_a_hundredth(name, x64):
    """λ is that share of the mean of the diagonal, of each layer and structure its own."""
    model, random = dense_model(dtype=np.float64), np.random.default_rng(2)
    units = {"attention": 2, "mlp": 6}
    active = {name: random.standard_normal((2, 20, len(each[0]))) for name, each in matrices(model).items()}
    active["mlp"][1] *= 10
    moments = {name: np.einsum("lti,ltj->lij", each, each) / 20 for name, each in active.items()}
    statistics = Statistics(
        jnp.asarray(1), jnp.asarray(9), jnp.zeros(1), {SECOND_MOMENT: jax.tree.map(jnp.asarray, moments)}
    )
    found = make_estimator(name).score(statistics, weights_of(model))

    def by_hand(structure: str, layer: int, share: float) -> np.ndarray:
        moment, weight = moments[structure][layer], matrices(model)[structure][layer]
        ridge, count = share * np.trace(moment) / len(moment), units[structure]
        if name == "leverage":
            projection = moment @ np.linalg.inv(moment + ridge * np.eye(len(moment)))
            return np.diag(projection).reshape(count, -1).sum(1)
        each = weight.reshape(count, -1, weight.shape[1])
        return np.array([fitted(each, moment, ridge, [unit])[0] for unit in range(count)])

    for structure, scores in found.items():
        for layer in range(2):
            np.testing.assert_allclose(scores[layer], by_hand(structure, layer, 0.01), rtol=1e-9)
            assert not np.allclose(scores[layer], by_hand(structure, layer, 0.02), rtol=1e-4), "control"
