"""Draws against a brute-force numpy oracle that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_jax.llama.decoder import Sampling, draw, settings_of, truncate

VOCAB = 40
cut = jax.jit(truncate)


def oracle(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Return which tokens of one row stay, by sorting."""
    order = np.argsort(-logits, kind="stable")
    kept = order[: top_k or len(order)]
    share = np.exp(logits[kept].astype(np.float64) - logits.max())
    share /= share.sum()
    count = int(np.searchsorted(np.cumsum(share), top_p) + 1) if top_p < 1 else len(kept)
    stays = np.zeros(len(logits), bool)
    stays[kept[:count]] = True
    return stays


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(0, VOCAB + 3), top_p=st.floats(0.01, 1.0), scale=st.floats(0.1, 5))
def test_truncate_is_what_sorting_gives(seed, top_k, top_p, scale):
    logits = (np.random.default_rng(seed).standard_normal((3, VOCAB)) * scale).astype(np.float32)
    ours = np.asarray(cut(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))
    for row, logit in zip(ours, logits, strict=True):
        stays = oracle(logit, top_k, float(np.float32(top_p)))
        different = np.flatnonzero(np.isfinite(row) != stays)
        if different.size:  # only where the sum of probabilities reaches top_p to within rounding
            other = oracle(logit, top_k, top_p + 1e-6), oracle(logit, top_k, max(top_p - 1e-6, 0))
            assert any(np.array_equal(np.isfinite(row), choice) for choice in other)
        np.testing.assert_array_equal(row[np.isfinite(row)], logit[np.isfinite(row)])


def test_equally_probable_tokens_stay_together():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]], jnp.float32)
    assert np.isfinite(cut(logits, jnp.int32(2), jnp.float32(1.0))).tolist() == [[True, True, True, False]]
    assert np.isfinite(cut(logits, jnp.int32(1), jnp.float32(1.0))).tolist() == [[True, False, False, False]]


def drawn(logits: np.ndarray, count: int, **options) -> np.ndarray:
    """Return `count` draws from one row of logits."""
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(draw(rows, settings_of(Sampling(**options)), keys))


def test_frequencies_are_the_softmax_at_that_temperature():
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    for temperature in (0.5, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        counts = np.bincount(drawn(logits, 20_000, temperature=temperature), minlength=4) / 20_000
        np.testing.assert_allclose(counts, expected, atol=4 * 0.5 / np.sqrt(20_000))
    assert np.abs(counts - np.exp(logits) / np.exp(logits).sum()).max() > 0.05


def test_only_what_was_left_is_drawn():
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    assert set(drawn(logits, 500, temperature=1.0)) == {0, 1, 2, 3}
    assert set(drawn(logits, 500, temperature=1.0, top_k=2)) == {0, 3}
    assert set(drawn(logits, 500, temperature=1.0, top_p=0.5)) == {3}
    assert set(drawn(logits, 500, temperature=0.0)) == {3}


def test_a_row_draws_from_its_own_key():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, VOCAB)), jnp.float32)
    keys, config = jax.random.split(jax.random.key(1), 4), settings_of(Sampling(temperature=1.0))
    together = np.asarray(draw(logits, config, keys))
    alone = [int(draw(logits[row : row + 1], config, keys[row : row + 1])[0]) for row in range(4)]
    assert together.tolist() == alone
    assert np.asarray(draw(logits, config, keys[::-1])).tolist() != alone
