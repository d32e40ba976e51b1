"""Costs of removal with the rest refitted, against least squares solved anew for every set of units that goes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation import make_estimator, observe
from saap_jax.estimation.activations import ACTIVATION_NORMS
from saap_jax.estimation.reconstruction import SECOND_MOMENT, greedy_costs, leverages, single_costs, swapped
from tests.helpers import dense_model, length_mask, ragged_model, random_tokens, reference
from tests.in_sequence import swapped_by_hand


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


def test_blocks_go_together(problem):
    """Two channels at a time: both have the costs of the same state."""
    weight, moment, ridge, _ = problem
    flat = weight.reshape(12, 1, 5)
    scores = np.asarray(greedy_costs(*map(jnp.asarray, (flat, moment, ridge)), block=2))
    single = np.asarray(single_costs(*map(jnp.asarray, (flat, moment, ridge))))
    first = np.argsort(single)[:2]
    np.testing.assert_allclose(scores[first], single[first], rtol=1e-9)
    third = np.argsort(scores)[2]
    np.testing.assert_allclose(
        scores[third],
        max(
            scores[first].max(),
            fitted(flat, moment, ridge, [*first, third])[0] - fitted(flat, moment, ridge, [*first])[0],
        ),
        rtol=1e-8,
    )


def test_leverage_is_the_diagonal_of_the_ridge_projection(problem):
    weight, moment, ridge, _ = problem
    projection = moment @ np.linalg.inv(moment + ridge * np.eye(12))
    got = np.asarray(leverages(*map(jnp.asarray, (weight, moment, ridge))))
    np.testing.assert_allclose(got, np.diag(projection).reshape(6, 2).sum(1), rtol=1e-9)


@pytest.fixture(scope="module")
def observed():
    """A model cut to layers of different widths, its second moments and norms, and the text."""
    model, tokens, mask = ragged_model(), random_tokens(3, 7), length_mask(7, 5, 6, seq=7)
    needs = frozenset({SECOND_MOMENT, ACTIVATION_NORMS})
    return model, tokens, mask, observe(model, [(tokens, mask)], needs)


def activations_of(model, tokens, mask) -> list[list[dict[str, np.ndarray]]]:
    """Return the activations of each example by layer, of its real tokens, by another implementation."""
    return [reference(model, row[real])[1] for row, real in zip(tokens, mask, strict=True)]


def test_second_moments_are_those_of_the_real_tokens(observed):
    model, tokens, mask, statistics = observed
    active = activations_of(model, tokens, mask)
    for name, moments in statistics.of(SECOND_MOMENT).items():
        for layer, moment in enumerate(np.asarray(moments)):
            rows = np.concatenate([each[layer][name].reshape(len(each[layer][name]), -1) for each in active])
            width = rows.shape[1]
            np.testing.assert_allclose(moment[:width, :width], rows.T @ rows / mask.sum(), rtol=1e-4, atol=1e-5)
            assert not moment[width:].any()


@pytest.mark.parametrize("tokens_by", ["mean", "l2"])
@pytest.mark.parametrize("examples_by", ["mean", "l2"])
def test_activation_norms_by_hand(observed, tokens_by, examples_by):
    model, tokens, mask, statistics = observed
    got = make_estimator(f"activation_norm(tokens='{tokens_by}', examples='{examples_by}')").score(statistics, model)
    active = activations_of(model, tokens, mask)
    for name, scores in got.items():
        for layer, values in enumerate(np.asarray(scores)):
            norms = []
            for each in active:
                units = each[layer][name]
                sizes = np.sqrt((units**2).sum(tuple(range(2, units.ndim))))  # [tokens, units]
                norms.append(sizes.mean(0) if tokens_by == "mean" else np.sqrt((sizes**2).sum(0)))
            norms = np.array(norms)
            expected = norms.mean(0) if examples_by == "mean" else np.sqrt((norms**2).mean(0))
            np.testing.assert_allclose(values[: len(expected)], expected, rtol=1e-4)
            assert np.isnan(values[len(expected) :]).all()


@pytest.mark.slow
def test_microbatches_change_nothing():
    """A row of padding alone counts for no example."""
    model, tokens = dense_model(), random_tokens(3, 6)
    mask = length_mask(6, 4, 6, seq=6)
    needs = frozenset({SECOND_MOMENT, ACTIVATION_NORMS})
    whole = observe(model, [(tokens, mask)], needs)
    rows = np.concatenate([tokens, tokens[:1]]), np.concatenate([mask, np.zeros((1, 6), bool)])
    parts = observe(model, [(rows[0][i : i + 2], rows[1][i : i + 2]) for i in (0, 2)], needs)
    for a, b in zip(jax.tree.leaves(whole.values), jax.tree.leaves(parts.values), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["obs(block=0)", "obs(damping=0.0)", "leverage(damping=-1.0)"])
def test_bad_options_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        make_estimator(text)
