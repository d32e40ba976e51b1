"""A training step on a quantised model never holds a copy of the model in floats."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from saap_jax.evaluation.cost import weight_bytes
from saap_jax.llama import quantized
from saap_jax.llama.loss import next_token_losses
from saap_jax.recovery import groupwise
from tests.helpers import random_model
from tests.recovery.models import spec_of

SPEC = spec_of(*[(4, 256)] * 12, embed=64)


def step_memory(model, method, remat):
    """Return the bytes of arguments and of temporaries of the compiled loss and gradient of the adapters."""
    graph, learning, frozen = nnx.split(model, method.trainable, ...)
    tokens = jnp.zeros((1, 4), jnp.int32)

    def loss(learning, frozen):
        model = nnx.merge(graph, learning, frozen)
        return jnp.sum(next_token_losses(model, tokens, jnp.ones(tokens.shape, bool), remat=remat)[0])

    memory = jax.jit(jax.value_and_grad(loss)).lower(learning, frozen).compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_step_fits_its_budget(remat, monkeypatch):
    """Arguments are packed; temporaries are a small part of the floats. Without the checkpoint they are all of them."""
    plain = random_model(SPEC)
    method = groupwise(group_size=32, rank=2, rounding="nearest")
    model = method.prepare(plain, jax.random.key(0))
    arguments, temporaries = step_memory(model, method, remat)
    floats = weight_bytes(plain)
    assert arguments < 0.3 * floats
    assert temporaries < 0.4 * floats
    if remat == "none":
        monkeypatch.setattr(quantized.jax, "checkpoint", lambda function: function)
        assert step_memory(model, method, remat)[1] > floats
