"""How often units are used: by hand, against activations of the numpy model, and independent of the other tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation import ACTIVATION_USAGE, Statistics, make_estimator, observe
from saap_jax.estimation.activations import MULTIPLES, used
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, length_mask, ragged_model, random_tokens, reference

NEED = frozenset({ACTIVATION_USAGE})


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
        assert used(activation, multiple)[0, 0].tolist() == expected
    activation = np.random.default_rng(0).standard_normal((1, 1, 5, 3))
    for multiple in (0.5, 0.9, 1.0, 1.3):
        expected = used_by_hand(activation[0, 0], multiple)
        np.testing.assert_array_equal(used(jnp.asarray(activation), multiple)[0, 0], expected)
        assert 0 < expected.sum() <= 5


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense_model, ragged_model])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_the_real_tokens(make, size):
    model, tokens, lengths = make(), random_tokens(3, 8), (8, 5, 2)
    mask = length_mask(*lengths, seq=8)
    rows = [np.pad(array, ((0, -3 % size), (0, 2))) for array in (tokens, mask)]
    statistics = observe(model, [tuple(a[i : i + size] for a in rows) for i in range(0, 3, size)], NEED)
    totals = {name: np.zeros(usage.shape) for name, usage in statistics.values[ACTIVATION_USAGE].items()}
    for row, length in zip(tokens, lengths, strict=True):
        for layer, activations in enumerate(reference(model, row[:length])[1]):
            for name, activation in activations.items():
                for token in activation:
                    if token.size:
                        for column, multiple in enumerate(MULTIPLES):
                            stands_out = used_by_hand(token.reshape(len(token), -1), multiple)
                            totals[name][layer, : len(token), column] += stands_out
    for name in STRUCTURES:
        np.testing.assert_allclose(
            statistics.values[ACTIVATION_USAGE][name], totals[name] / sum(lengths), rtol=1e-6, err_msg=name
        )
    assert len(np.unique(totals["mlp"][..., 1])) > 3  # units differ


def test_scores_are_the_shares_at_one_multiple():
    model = ragged_model()
    shares = {n: np.random.default_rng(0).random((4, u, len(MULTIPLES))) for n, u in (("attention", 2), ("mlp", 6))}
    values = {ACTIVATION_USAGE: {name: jnp.asarray(share) for name, share in shares.items()}}
    statistics = Statistics(jnp.asarray(1), jnp.asarray(9), jnp.zeros(1), values)
    for multiple, column in ((0.5, 0), (1.0, 1), (4.0, 3)):
        scores = make_estimator(f"activation_frequency(multiple={multiple})").score(statistics, model)
        np.testing.assert_allclose(scores["mlp"][:2], shares["mlp"][:2, :, column], rtol=1e-6)
        assert np.isnan(scores["attention"][3]).all()
    np.testing.assert_array_equal(
        make_estimator("activation_frequency").score(statistics, model)["mlp"][:2],
        values[ACTIVATION_USAGE]["mlp"][:2, :, 1],
    )
    with pytest.raises(ValueError, match=r"expected multiple to be one of 0.5, 1, 2, 4, got 3"):
        make_estimator("activation_frequency(multiple=3.0)")
