"""Gates and weights of the real model: ∂ℒ/∂g_u = Σ w ∂w over what the gated activation is linear in."""

import numpy as np
import pytest

from saap_jax.data import calibration_windows
from saap_jax.estimation import GATE_GRADIENT, WEIGHT_GRADIENT, observe
from saap_jax.llama import load_model, load_tokenizer
from saap_jax.structures import discover, unit_view

LINEAR = {"attention": "attention/value", "mlp": "mlp/up"}
"""The member that a unit's activation is linear in; the residual stream is linear in it through the writing member."""


@pytest.mark.slow
def test_gate_gradients_are_sums_of_weight_times_gradient():
    """Over the writing member and the linear one, to 1e-5 of the layer's largest; over no other member."""
    try:
        model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    windows = calibration_windows("builtin:reference", tokenizer, 2, 48, 0)
    statistics = observe(model, [tuple(windows)], frozenset({GATE_GRADIENT, WEIGHT_GRADIENT}))
    (run,), (gradient,) = model.segments, statistics.of(WEIGHT_GRADIENT).segments
    equal = 0
    for name, structure in discover(model).items():
        # windows of equal length: the mean over examples is the mean over tokens
        gates = np.mean(np.asarray(statistics.of(GATE_GRADIENT)[name], np.float64), axis=0)
        largest = np.abs(gates).max(axis=1, keepdims=True)
        assert gates.shape == (len(structure.units), structure.units[0])
        assert largest.min() > 0
        for member in structure.members:
            weight, change = (np.asarray(unit_view(tree, member), np.float64) for tree in (run, gradient))
            error = np.abs(np.einsum("lur,lur->lu", weight, change) - gates) / largest
            if member.writes or member.path == LINEAR[name]:
                assert error.max() <= 1e-5, member.path
                equal += 1
            else:
                assert error.max(axis=1).min() > 1e-2, member.path  # in every layer
    assert equal == 4
