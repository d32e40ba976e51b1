"""The next-token loss: -log softmax at the next token, where that token is real."""

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.llama.loss import predicted_tokens
from tests.helpers import dense_model, forward, length_mask, losses_of, random_tokens, reference_losses

TOKENS = random_tokens(3, 8)
MASK = length_mask(8, 5, 0, seq=8)


def losses(model, tokens=TOKENS, mask=MASK) -> np.ndarray:
    return np.asarray(losses_of(model, jnp.asarray(tokens), jnp.asarray(mask)))


def test_loss_by_hand():
    model = dense_model()
    log_probability = np.asarray(jax.nn.log_softmax(forward(model, jnp.asarray(TOKENS))))
    expected = [
        -sum(log_probability[n, t, TOKENS[n, t + 1]] for t in range(length - 1)) for n, length in ((0, 8), (1, 5))
    ]
    np.testing.assert_allclose(losses(model), [*expected, 0], rtol=1e-5)
    np.testing.assert_allclose(losses(model)[0], reference_losses(model, TOKENS[0]).sum(), rtol=1e-5)


def test_masked_tokens_change_nothing():
    model = dense_model()
    other = np.where(MASK, TOKENS, (TOKENS + 5) % 24)
    np.testing.assert_array_equal(losses(model), losses(model, other))
    other[1, 4] = (other[1, 4] + 1) % 24  # the last real token of example 1
    changed = losses(model, other) != losses(model)
    assert changed.tolist() == [False, True, False]


def test_longer_padding_changes_nothing():
    model = dense_model()
    padded = losses(model, np.pad(TOKENS, ((0, 2), (0, 3))), np.pad(MASK, ((0, 2), (0, 3))))
    np.testing.assert_allclose(padded, [*losses(model), 0, 0], rtol=1e-6)


def test_padding_gets_no_gradient():
    model = dense_model()
    gradient = jax.jit(jax.grad(lambda m, t, k: losses_of(m, t, k).sum()))
    whole = gradient(model, jnp.asarray(TOKENS), jnp.asarray(MASK))
    padded = gradient(
        model, jnp.pad(jnp.asarray(TOKENS), ((0, 0), (0, 3))), jnp.pad(jnp.asarray(MASK), ((0, 0), (0, 3)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, padded)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))


def test_bfloat16_model_has_float32_loss():
    assert losses(dense_model(dtype=jnp.bfloat16)).dtype == np.float32


def test_predicted_tokens():
    """The first token is predicted by nothing."""
    mask = length_mask(8, 5, 1, 0, seq=8)
    np.testing.assert_array_equal(predicted_tokens(jnp.asarray(mask)), [7, 4, 0, 0])
