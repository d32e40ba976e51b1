"""How much sub-blocks turn the residual stream, against cosines of the numpy model."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation import BLOCK_CHANGE, Statistics, make_estimator, observe
from saap_jax.estimation.activations import turn
from saap_jax.llama.segments import existing_units
from tests.helpers import dense_model, layers_of, length_mask, ragged_model, random_tokens, reference

NEED = frozenset({BLOCK_CHANGE})


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


def residuals(model, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the residual stream before, between and after the sub-blocks of each layer, [seq, embed]."""
    x, stream = np.asarray(model.embedding[...], np.float64)[tokens], []
    for layer, activations in zip(layers_of(model), reference(model, tokens)[1], strict=True):
        y = x + np.einsum("tkgh,kghd->td", activations["attention"], layer["attention/output"])
        z = y + activations["mlp"] @ layer["mlp/down"]
        stream.append((x, y, z))
        x = z
    return stream


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense_model, ragged_model])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_means_over_the_real_tokens(make, size):
    model, tokens, lengths = make(), random_tokens(3, 8), (8, 5, 2)
    mask = length_mask(*lengths, seq=8)
    rows = [np.pad(array, ((0, -3 % size), (0, 2))) for array in (tokens, mask)]
    statistics = observe(model, [tuple(a[i : i + size] for a in rows) for i in range(0, 3, size)], NEED)
    change = statistics.values[BLOCK_CHANGE]
    sums = {name: np.zeros(len(change[name])) for name in ("attention", "mlp", "layer")}
    for row, length in zip(tokens, lengths, strict=True):
        for layer, (x, y, z) in enumerate(residuals(model, row[:length])):
            for name, pair in {"attention": (x, y), "mlp": (y, z), "layer": (x, z)}.items():
                sums[name][layer] += sum(one_minus_cos(a, b) for a, b in zip(*pair, strict=True))
    for name, total in sums.items():
        np.testing.assert_allclose(change[name], total / sum(lengths), rtol=2e-5, atol=1e-7, err_msg=name)
    if make is ragged_model:
        assert change["attention"][3] < 1e-7  # no attention there, so nothing turns
    assert change["mlp"].min() > 1e-3


def test_units_of_a_sub_block_share_its_score():
    model, exists = ragged_model(), existing_units(ragged_model().segments)
    change = {name: jnp.arange(4.0) + start for name, start in (("attention", 0.1), ("mlp", 0.2), ("layer", 0.3))}
    statistics = Statistics(jnp.asarray(1), jnp.asarray(9), jnp.zeros(1), {BLOCK_CHANGE: change})
    for granularity, starts in (("sub_block", {"attention": 0.1, "mlp": 0.2}), ("layer", dict.fromkeys(exists, 0.3))):
        scores = make_estimator(f"block_influence(granularity='{granularity}')").score(statistics, model)
        for name, start in starts.items():
            expected = np.broadcast_to(np.arange(4)[:, None] + start, exists[name].shape)
            np.testing.assert_allclose(scores[name], np.where(exists[name], expected, np.nan), rtol=1e-6)
    default = make_estimator("block_influence").score(statistics, model)
    np.testing.assert_allclose(default["mlp"][0], 0.2, rtol=1e-6)
    with pytest.raises(ValueError, match="expected granularity 'sub_block' or 'layer', got 'head'"):
        make_estimator("block_influence(granularity='head')")
