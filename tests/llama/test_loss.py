"""Losses in chunks of positions: those of all logits at once, with their gradients, and never all logits in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama import loss
from saap_jax.llama.loss import next_token_losses, over_positions
from saap_jax.recovery.objective import Objective, Packed, sums_of
from tests.helpers import dense_model, length_mask, random_model, random_tokens, spec_of

TOKENS, MASK = random_tokens(3, 9), length_mask(9, 5, 2, seq=9)
WEIGHTS = np.array([1.0, 0.5, 2.0])
"""Of the examples: a gradient that is not that of their sum."""


def value_and_gradient(model, **options):
    def total(model):
        return jnp.sum(
            jnp.asarray(WEIGHTS) * next_token_losses(model, jnp.asarray(TOKENS), jnp.asarray(MASK), **options)[0]
        )

    return jax.jit(jax.value_and_grad(total))(model)


@functools.cache
def model_at_once(tied: bool):
    """Return a model, and its value and gradient of all logits at once."""
    model = dense_model(dtype=np.float64, tied=tied)
    return model, *value_and_gradient(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "options", "most"),
    [
        (True, {}, 1000),
        (True, {"once": True}, 1),
        (False, {}, 1),
        (False, {"once": True}, 1000),
        (False, {"once": True}, 10**9),
    ],
)
def test_chunks_change_neither_losses_nor_gradients(tied, options, most, monkeypatch, x64):
    model, value, gradient = model_at_once(tied)
    monkeypatch.setattr(loss, "LOGITS", most)
    monkeypatch.setattr(loss, "LOGITS_ONCE", most)
    monkeypatch.setattr(loss, "ROWS_ONCE", 1)
    found, found_gradient = value_and_gradient(model, **options)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found_gradient, gradient)
    assert np.abs(gradient.embedding[...]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_training_in_chunks_is_training_at_once(distillation, monkeypatch, x64):
    model, teacher = (random_model(spec_of((2, 3), (2, 3)), seed=seed, dtype=np.float64) for seed in (0, 1))
    positions = np.broadcast_to(np.arange(9), (3, 9))
    rows = Packed(*map(jnp.asarray, (TOKENS, np.zeros((3, 9), np.int32), positions, MASK)))
    objective = Objective(distillation=distillation, temperature=1.5)

    def total(model):
        sums = sums_of(model, teacher, rows, objective)
        return sums.loss + 3 * sums.divergence

    value, gradient = jax.jit(jax.value_and_grad(total))(model)
    monkeypatch.setattr(loss, "LOGITS", 1)
    found, found_gradient = jax.jit(jax.value_and_grad(lambda model: total(model)))(model)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found_gradient, gradient)


def test_positions_that_were_added_to_the_last_chunk_are_not_returned(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 4 * 3 * 24 * 4)  # four positions of three examples and 24 words
    seen = []

    def function(array):
        seen.append(array.shape)
        return 2 * array

    array = jnp.arange(3 * 9.0).reshape(3, 9)
    np.testing.assert_array_equal(over_positions(function, array, logits=[dense_model()]), 2 * array)
    assert set(seen) == {(3, 3)}
    monkeypatch.setattr(loss, "LOGITS", 10**9)
    over_positions(function, array, logits=[dense_model()])
    assert seen[-1] == (3, 9)


@pytest.mark.slow
def test_no_program_holds_the_logits_of_all_positions(monkeypatch):
    """Of 4,096 words and 8 x 64 positions: 8 MiB."""
    spec = dataclasses.replace(spec_of((2, 3)), vocab=4096)
    model, tokens = random_model(spec), jnp.asarray(random_tokens(8, 64))
    mask = jnp.ones(tokens.shape, bool)

    def held(**options):
        def total(model):
            return jnp.sum(next_token_losses(model, tokens, mask, **options)[0])

        lowered = jax.jit(jax.value_and_grad(lambda model: total(model))).lower(model)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole = held()
    monkeypatch.setattr(loss, "LOGITS", 2**19)
    monkeypatch.setattr(loss, "LOGITS_ONCE", 2**19)
    monkeypatch.setattr(loss, "ROWS_ONCE", 8)
    assert whole > 8 * 2**20
    assert held() < 0.5 * whole
    assert held(once=True) < 0.5 * whole
