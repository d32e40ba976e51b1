"""Statistics of activations: by hand, against the numpy model, and independent of microbatches and padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.activations import (
    ACTIVATION_MOMENTS,
    ACTIVATION_NORMS,
    ACTIVATION_USAGE,
    BLOCK_CHANGE,
    MULTIPLES,
    turn,
    used,
)
from saap_jax.estimation.base import Statistics
from saap_jax.estimation.observe import observe
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.estimation.registry import make_estimator
from saap_jax.llama.segments import existing_units
from saap_jax.structures.weights import weights_of
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, layers_of, length_mask, ragged_model, random_tokens, reference

NEEDS = frozenset({ACTIVATION_MOMENTS, ACTIVATION_NORMS, ACTIVATION_USAGE, BLOCK_CHANGE, SECOND_MOMENT})
TOKENS, LENGTHS = random_tokens(3, 8), (8, 5, 2)
CASES = [(make, size) for make in (dense_model, ragged_model) for size in (1, 2, 3)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def observed(request):
    """A model, its statistics by microbatches of some size with padding, and activations of real tokens by layer."""
    make, size = request.param
    model, mask = make(), length_mask(*LENGTHS, seq=8)
    rows = [np.pad(array, ((0, -3 % size), (0, 2))) for array in (TOKENS, mask)]
    statistics = observe(model, [tuple(a[i : i + size] for a in rows) for i in range(0, 3, size)], NEEDS)
    active = [reference(model, row[:length])[1] for row, length in zip(TOKENS, LENGTHS, strict=True)]
    return model, statistics, active


def places(active):
    """Yield structure, layer, and the activations `[tokens, units, coordinates]` of each example."""
    for layer in range(len(active[0])):
        for name in STRUCTURES:
            each = [example[layer][name] for example in active]
            yield name, layer, [x.reshape(*x.shape[:2], int(np.prod(x.shape[2:]))) for x in each]


@pytest.mark.slow
def test_moments_are_means_over_real_tokens(observed):
    _, statistics, active = observed
    moments = statistics.of(ACTIVATION_MOMENTS)
    mean, square = moments.mean, moments.square
    for name, layer, each in places(active):
        values = np.concatenate(each)
        for moment, power in ((mean, 1), (square, 2)):
            actual = np.asarray(moment[name])[layer]
            expected = (values**power).mean(axis=0)
            np.testing.assert_allclose(actual[: len(expected)], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(actual[len(expected) :], 0)
        flat = values.reshape(len(values), -1)
        second, width = np.asarray(statistics.of(SECOND_MOMENT)[name])[layer], flat.shape[1]
        np.testing.assert_allclose(second[:width, :width], flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
        assert not second[width:].any()


@pytest.mark.slow
@pytest.mark.parametrize("tokens_by", ["mean", "l2"])
@pytest.mark.parametrize("examples_by", ["mean", "l2"])
def test_activation_norms_by_hand(observed, tokens_by, examples_by):
    model, statistics, active = observed
    got = make_estimator(f"activation_norm(tokens='{tokens_by}', examples='{examples_by}')").score(
        statistics, weights_of(model)
    )
    for name, layer, each in places(active):
        sizes = [np.sqrt((x**2).sum(2)) for x in each]  # [tokens, units]
        norms = np.array([s.mean(0) if tokens_by == "mean" else np.sqrt((s**2).sum(0)) for s in sizes])
        expected = norms.mean(0) if examples_by == "mean" else np.sqrt((norms**2).mean(0))
        values = np.asarray(got[name])[layer]
        np.testing.assert_allclose(values[: len(expected)], expected, rtol=1e-4)
        assert np.isnan(values[len(expected) :]).all()


# --- how often units are used ----------------------------------------------------------------------


def used_by_hand(activation: np.ndarray, multiple: float) -> np.ndarray:
    """Return which units [units] of one token's activation [units, coordinates] stand out."""
    rms = np.sqrt(sum(a * a for a in activation.flat) / activation.size)
    return np.asarray([np.sqrt(sum(a * a for a in unit) / len(unit)) > multiple * rms for unit in activation])


def test_used_by_hand(x64):
    """RMS of (3, 1, 1, 1) is √3; of the heads ((3, 1), (0, 0)), √(10/4), the first of which has √5."""
    channels = jnp.asarray([3.0, -1, 1, 1])[None, None, :, None]
    heads = jnp.asarray([[3.0, 1], [0, 0]])[None, None]
    for activation, multiple, expected in (
        (channels, 0.5, [True, True, True, True]),
        (channels, 1.0, [True, False, False, False]),
        (channels, 1.7, [True, False, False, False]),
        (channels, 1.8, [False, False, False, False]),
        (heads, 1.4, [True, False]),
        (heads, 1.42, [False, False]),
        (0 * channels, 0.5, [False] * 4),
    ):
        assert used(activation, multiple, jnp.ones(activation.shape[2]))[0, 0].tolist() == expected
    alone = used(heads, 1.4, jnp.asarray([1.0, 0.0]))[0, 0].tolist()
    assert alone == [False, False], "where the second has gone, the first has the root mean square of all"


@pytest.mark.slow
def test_shares_of_the_real_tokens(observed):
    _, statistics, active = observed
    totals = {name: np.zeros(usage.shape) for name, usage in statistics.of(ACTIVATION_USAGE).items()}
    for name, layer, each in places(active):
        for token in np.concatenate(each):
            for column, multiple in enumerate(MULTIPLES) if token.size else ():
                totals[name][layer, : len(token), column] += used_by_hand(token, multiple)
    for name, total in totals.items():
        np.testing.assert_allclose(statistics.of(ACTIVATION_USAGE)[name], total / sum(LENGTHS), rtol=1e-6, err_msg=name)
    assert len(np.unique(totals["mlp"][..., 1])) > 3  # units differ


def test_scores_are_the_shares_at_one_multiple():
    model = ragged_model()
    shares = {n: np.random.default_rng(0).random((4, u, len(MULTIPLES))) for n, u in (("attention", 2), ("mlp", 6))}
    values = {ACTIVATION_USAGE: {name: jnp.asarray(share) for name, share in shares.items()}}
    statistics = Statistics(jnp.asarray(1), jnp.asarray(9), jnp.zeros(1), values)
    for options, column in (("multiple=0.5", 0), ("", 1), ("multiple=4.0", 3)):
        scores = make_estimator(f"activation_frequency({options})").score(statistics, weights_of(model))
        np.testing.assert_allclose(scores["mlp"][:2], shares["mlp"][:2, :, column], rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected multiple to be one of 0.5, 1, 2, 4, got 3"):
        make_estimator("activation_frequency(multiple=3.0)")


# --- how much sub-blocks turn the stream -----------------------------------------------------------


def one_minus_cos(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5


@pytest.mark.slow
def test_turn_by_hand(x64):
    vectors = jnp.asarray([[3.0, 4], [-6, -8], [4, -3], [6, 8], [0, 0]])[None]
    start = jnp.broadcast_to(vectors[:, :1], vectors.shape)
    np.testing.assert_allclose(turn(start, vectors)[0], [0, 2, 1, 0, 0.5], atol=1e-12)
    before, after = np.random.default_rng(0).standard_normal((2, 1, 7, 5))
    expected = [one_minus_cos(a, b) for a, b in zip(before[0], after[0], strict=True)]
    np.testing.assert_allclose(turn(jnp.asarray(before), jnp.asarray(after))[0], expected, rtol=1e-12)


def test_small_turns_keep_their_digits():
    """In float32, 1 - cos of a turn by 1e-3 would be off by several per cent."""
    before = np.random.default_rng(0).standard_normal((1, 20, 64))
    after = before + 1e-3 * np.random.default_rng(1).standard_normal(before.shape)
    expected = np.asarray([one_minus_cos(a, b) for a, b in zip(before[0], after[0], strict=True)])
    single = [jnp.asarray(x, jnp.float32) for x in (before, after)]
    np.testing.assert_allclose(turn(*single)[0], expected, rtol=2e-3)
    a, b = (np.asarray(x[0], np.float32) for x in single)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    naive = np.float32(1) - np.einsum("td,td->t", a, b) / norms
    assert not np.allclose(naive, expected, rtol=2e-3)


@pytest.mark.slow
def test_turns_are_means_over_the_real_tokens(observed):
    model, statistics, active = observed
    change = statistics.of(BLOCK_CHANGE)
    sums = {name: np.zeros(len(change[name])) for name in (*STRUCTURES, "layer")}
    for tokens, length, activations in zip(TOKENS, LENGTHS, active, strict=True):
        x = np.asarray(model.embedding[...], np.float64)[tokens[:length]]
        for layer, (matrices, own) in enumerate(zip(layers_of(model), activations, strict=True)):
            y = x + np.einsum("tkgh,kghd->td", own["attention"], matrices["attention/output"])
            z = y + own["mlp"] @ matrices["mlp/down"]
            for name, pair in {"attention": (x, y), "mlp": (y, z), "layer": (x, z)}.items():
                sums[name][layer] += sum(one_minus_cos(a, b) for a, b in zip(*pair, strict=True))
            x = z
    for name, total in sums.items():
        np.testing.assert_allclose(change[name], total / sum(LENGTHS), rtol=2e-5, atol=1e-7, err_msg=name)
    if len(change["mlp"]) == 4:
        assert change["attention"][3] < 1e-7  # no attention there, so nothing turns
    assert change["mlp"].min() > 1e-3


def test_units_of_a_sub_block_share_its_score():
    model, exists = ragged_model(), existing_units(ragged_model().segments)
    change = {name: jnp.arange(4.0) + start for name, start in (("attention", 0.1), ("mlp", 0.2), ("layer", 0.3))}
    statistics = Statistics(jnp.asarray(1), jnp.asarray(9), jnp.zeros(1), {BLOCK_CHANGE: change})
    for granularity, starts in (("sub_block", {"attention": 0.1, "mlp": 0.2}), ("layer", dict.fromkeys(exists, 0.3))):
        scores = make_estimator(f"block_influence(granularity='{granularity}')").score(statistics, weights_of(model))
        for name, start in starts.items():
            expected = np.broadcast_to(np.arange(4)[:, None] + start, exists[name].shape)
            np.testing.assert_allclose(scores[name], np.where(exists[name], expected, np.nan), rtol=1e-6)
