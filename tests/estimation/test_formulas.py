"""Formulas against numbers made by hand: one matrix, one unit, one number at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.activations import ACTIVATION_MOMENTS, Moments
from saap_jax.estimation.base import Statistics
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.registry import make_estimator
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.structures.weights import weights_of
from saap_jax.trace.subject.weights import TracedWeights
from saap_jax.types import STRUCTURES
from tests.helpers import layers_of, random_model, spec_of

REDUCTIONS = {"sum": sum, "mean": np.mean, "max": max, "prod": np.prod, "last": lambda values: values[-1]}
UNITS = [
    (name, layer, unit) for name, units in (("attention", 2), ("mlp", 3)) for layer in (0, 1) for unit in range(units)
]


@pytest.fixture
def toy(x64):
    """A model of two layers, and random numbers in place of what a pass observes."""
    spec = spec_of((2, 3), (2, 3))
    model, random = random_model(spec, dtype=np.float64), np.random.default_rng(5)
    units = {"attention": (2, 2), "mlp": (2, 3)}
    coordinates = {"attention": 2 * 4, "mlp": 1}
    mean = {n: random.standard_normal((*u, coordinates[n])) for n, u in units.items()}
    square = {n: m**2 + random.uniform(0.1, 1, m.shape) for n, m in mean.items()}
    values = {
        WEIGHT_GRADIENT: random_model(spec, seed=1, dtype=np.float64),
        SQUARED_WEIGHT_GRADIENT: random_model(spec, seed=2, dtype=np.float64),
        GATE_GRADIENT: {n: random.standard_normal((5, *u)) for n, u in units.items()},
        ACTIVATION_MOMENTS: Moments(mean, square),
    }
    values = jax.tree.map(jnp.asarray, values)
    return model, Statistics(jnp.asarray(5), jnp.asarray(40), jnp.zeros(5), values)


def scores_of(name, toy) -> dict[str, np.ndarray]:
    model, statistics = toy
    return jax.tree.map(np.asarray, make_estimator(name).score(statistics, weights_of(model)))


def matrices(tree, structure: str, layer: int, unit: int) -> list[np.ndarray]:
    """Return a unit's part of each matrix, the writing one last."""
    w = layers_of(tree)[layer]
    if structure == "mlp":
        return [w["mlp/gate"][:, unit], w["mlp/up"][:, unit], w["mlp/down"][unit]]
    parts = [w[f"attention/{name}"][:, unit] for name in ("query", "key", "value")]
    return [*parts, w["attention/output"][unit]]


def assert_scores(actual, by_hand) -> None:
    """Assert that every score is what `by_hand(structure, layer, unit)` says."""
    for structure, layer, unit in UNITS:
        np.testing.assert_allclose(actual[structure][layer, unit], by_hand(structure, layer, unit), rtol=1e-10)


OF_MATRIX = {
    "magnitude": lambda w, d, s: sum(w**2),
    "taylor_vector": lambda w, d, s: abs(sum(w * d)),
    "taylor_element": lambda w, d, s: sum(abs(w * d)),
    "taylor_element_second": lambda w, d, s: sum(abs(w * d - 0.5 * w**2 * s)),
    "fisher": lambda w, d, s: sum(w**2 * s),
}
"""Estimator -> what it makes of a unit's numbers in one matrix: weights, gradients, mean squared gradients."""


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OF_MATRIX)
def test_formulas_on_weights(toy, name, reduction):
    trees = toy[0], toy[1].values[WEIGHT_GRADIENT], toy[1].values[SQUARED_WEIGHT_GRADIENT]

    def by_hand(*unit):
        numbers = zip(*(matrices(tree, *unit) for tree in trees), strict=True)
        each = [OF_MATRIX[name](*(part.ravel() for part in parts)) for parts in numbers]
        return REDUCTIONS[reduction](each) ** (0.5 if name == "magnitude" else 1)

    scores = scores_of(f"{name}(reduction='{reduction}')", toy)
    assert_scores(scores, by_hand)
    same = np.allclose(scores["mlp"], scores_of(name, toy)["mlp"])
    assert same == (reduction == "sum"), "sum is the default, and others differ"


def test_taylor_element_within_layers_is_the_sum_over_all_their_matrices(toy):
    actual, each = scores_of("taylor_element(within='layer')", toy), scores_of("taylor_element", toy)
    for layer in range(len(each["mlp"])):
        total = sum(np.nansum(each[name][layer]) for name in ("attention", "mlp"))
        for name in ("attention", "mlp"):
            known = ~np.isnan(each[name][layer])
            np.testing.assert_allclose(actual[name][layer][known], total, rtol=1e-6)
            assert np.isnan(actual[name][layer][~known]).all()
    with pytest.raises(ValueError, match="expected within 'unit' for a traced model"):
        make_estimator("taylor_element(within='layer')").score(toy[1], TracedWeights((), {}))


@pytest.mark.parametrize("heads", ["shared", "each its own"])
def test_taylor_element_within_blocks_by_hand(toy, heads, x64):
    """|w ∂w| over 3 · channels, or over 4 · head_dim · embed a query head; key and value only where one reads them."""
    model, gradient = toy[0], toy[1].values[WEIGHT_GRADIENT]
    if heads != "shared":
        model, gradient = (random_model(spec_of((2, 3), (2, 3), q_per_kv=1), seed, np.float64) for seed in (3, 4))
    statistics = toy[1]._replace(values={WEIGHT_GRADIENT: gradient})
    embed, channels, head_dim = 8, 3, 4

    def by_hand(structure, layer, unit):
        both = zip(*(matrices(tree, structure, layer, unit) for tree in (model, gradient)), strict=True)
        sums = [np.abs(w * d).sum() for w, d in both]
        if structure == "mlp":
            return sum(sums) / (3 * channels)
        if heads == "shared":  # the mean of the two query heads
            return (sums[0] + sums[3]) / 2 / (4 * head_dim * embed)
        return sum(sums) / (4 * head_dim * embed)

    actual = scores_of("taylor_element(within='block')", (model, statistics))
    assert_scores(actual, by_hand)
    plain = scores_of("taylor_element", (model, statistics))
    with pytest.raises(AssertionError):  # control
        assert_scores(plain, by_hand)
    with pytest.raises(ValueError, match="expected within 'unit' for a traced model, which has no layers, got 'block'"):
        make_estimator("taylor_element(within='block')").score(statistics, TracedWeights((), {}))
    with pytest.raises(ValueError, match="expected reduction 'sum' beside within 'block', got 'max'"):
        make_estimator("taylor_element(within='block', reduction='max')")


@pytest.mark.parametrize(("name", "each"), [("gate_taylor", abs), ("gate_fisher", lambda g: g**2)])
def test_gates(toy, name, each):
    gradients = toy[1].values[GATE_GRADIENT]
    assert_scores(
        scores_of(name, toy),
        lambda structure, layer, unit: sum(each(float(gradients[structure][n, layer, unit])) for n in range(5)) / 5,
    )


def written(toy, structure, layer, unit):
    """Return (row of W_out, mean a, mean a²) of each coordinate of a unit."""
    moments = toy[1].values[ACTIVATION_MOMENTS]
    weights = layers_of(toy[0])[layer]
    if structure == "mlp":
        rows = [weights["mlp/down"][unit]]
    else:
        rows = [weights["attention/output"][unit, g, h] for g in range(2) for h in range(4)]
    mean, square = (np.asarray(m[structure])[layer, unit] for m in (moments.mean, moments.square))
    return zip(rows, mean, square, strict=True)


def test_wanda(toy):
    def by_hand(*unit):
        return sum(abs(w) * square**0.5 for row, _, square in written(toy, *unit) for w in row)

    assert_scores(scores_of("wanda", toy), by_hand)


def test_fluctuation(toy):
    def by_hand(*unit):
        return sum((square - mean**2) * sum(w**2 for w in row) for row, mean, square in written(toy, *unit))

    assert_scores(scores_of("fluctuation", toy), by_hand)


@pytest.mark.parametrize("power", [1, 2])
def test_fluctuation_standardised_as_flap_does(toy, power):
    """By loops: the coordinates of a layer to mean 0 and deviation 1, then averaged to units.

    FLAP's code squares the metric of the output projection of attention before that.
    """
    scores = scores_of(f"fluctuation(standardize=True, attention_power={power})", toy)
    if power == 2:
        np.testing.assert_array_equal(scores["attention"], scores_of("fluctuation(standardize=True)", toy)["attention"])
    for structure, values in scores.items():
        for layer in range(values.shape[0]):
            units = np.flatnonzero(np.isfinite(np.asarray(values[layer])))
            each = [
                [(square - mean**2) * sum(w**2 for w in row) for row, mean, square in written(toy, structure, layer, u)]
                for u in units
            ]
            if not each:
                continue
            if structure == "attention":
                each = [np.array(f) ** power for f in each]
            flat = np.concatenate(each)
            by_hand = [((np.array(f) - flat.mean()) / flat.std(ddof=1)).mean() for f in each]
            np.testing.assert_allclose(np.asarray(values[layer])[units], by_hand, rtol=1e-4, atol=1e-5)
            assert abs(np.mean(by_hand)) < 1e-6
    assert any(bool(jnp.any(values < 0)) for values in scores.values())


def test_variance_lost_to_rounding_is_zero(toy):
    """mean a² - (mean a)² may come out below zero; a score may not."""
    model, statistics = toy
    moments = statistics.values[ACTIVATION_MOMENTS]
    mean, square = moments.mean, moments.square
    constant = Moments(mean, {name: jnp.square(m) * (1 - 1e-12) for name, m in mean.items()})
    scores = make_estimator("fluctuation").score(
        statistics._replace(values={ACTIVATION_MOMENTS: constant}), weights_of(model)
    )
    assert all(bool(jnp.all(score == 0)) for score in scores.values())
    assert all(bool(jnp.all(score > 0)) for score in scores_of("fluctuation", toy).values())
    assert all(bool(jnp.all(square[name] >= jnp.square(mean[name]))) for name in STRUCTURES)


def test_random_is_uniform_and_seeded(toy):
    model = random_model(spec_of((2, 3000)))
    first = np.asarray(make_estimator("random").score(toy[1], weights_of(model))["mlp"])
    assert 0 <= first.min() < 0.01
    assert 0.99 < first.max() < 1
    assert abs(first.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(first, make_estimator("random(seed=0)").score(toy[1], weights_of(model))["mlp"])
    assert not np.array_equal(first, make_estimator("random(seed=1)").score(toy[1], weights_of(model))["mlp"])
