"""Neither a training step nor decoding on a quantised model ever holds a copy of the model in floats."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from saap_jax.evaluation.timing import Workload, compile_programs
from saap_jax.llama import quantized
from saap_jax.llama.decoder import single_layers
from saap_jax.llama.loss import next_token_losses
from saap_jax.recovery.adapters import groupwise
from saap_jax.recovery.quantization import quantize
from saap_jax.structures.discovery import weight_bytes
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


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
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


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_needs_no_floats(batch, monkeypatch):
    """Of single layers, each product by itself; negative control: without the dependency, XLA makes them all early."""
    plain = random_model(spec_of(*[(4, 256)] * 4, embed=64))
    model = single_layers(quantize(plain, group_size=32, rounding="nearest"))
    floats = weight_bytes(plain)

    def temporaries():
        programs = compile_programs(model, Workload(batch, 8, 4))
        return [each.memory_analysis().temp_size_in_bytes for each in (programs.prefill, programs.decode)]

    assert max(temporaries()) < 0.6 * floats
    if batch == 3:
        jax.clear_caches()
        monkeypatch.setattr(quantized, "_after", lambda packed, first: packed)
        assert max(temporaries()) > 0.9 * floats
        jax.clear_caches()
