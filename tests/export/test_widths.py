"""Widths that a format asks for, and what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.export.widths import deci_widths, uniform_widths, without_empty_layers
from tests.export.models import EMPTY, RAGGED, SPECS, gemma, spec_of
from tests.helpers import random_model, random_tokens


def tuples(layers):
    return [(layer.kv_heads, layer.q_per_kv, layer.mlp) for layer in layers]


@pytest.mark.parametrize("name", SPECS)
def test_uniform_widths_are_the_narrowest(name):
    """Brute force over every pair of head counts: nothing narrower holds all layers and divides the embeddings."""
    spec = SPECS[name]
    layer = uniform_widths(spec)[0]
    attending = [other for other in spec.layers if other.kv_heads]
    held = {
        kv * group
        for kv in range(1, spec.embed + 1)
        for group in range(1, spec.embed + 1)
        if spec.embed % (kv * group) == 0
        and all(kv >= other.kv_heads and group >= other.q_per_kv for other in attending)
    }
    assert layer.kv_heads * layer.q_per_kv == min(held)
    assert layer.mlp == max(1, *(other.mlp for other in spec.layers))


def test_no_number_of_heads_may_divide_the_embeddings():
    with pytest.raises(ValueError, match="at least 5 x 1 that divides .* 4, got none; choose --format ragged"):
        uniform_widths(spec_of((5, 1, 4), (1, 1, 4), embed=4))


def test_deci_widths():
    assert deci_widths(RAGGED) == RAGGED.layers
    assert tuples(deci_widths(EMPTY)) == [(1, 1, 8), (2, 3, 32), (0, 2, 32), (1, 1, 40), (0, 1, 9), (2, 1, 32)]
    assert [layer.kv_heads for layer in deci_widths(SPECS["empty_biased"])] == [1, 2, 1, 1, 1, 2]


GEMMA = gemma(7)
HOLES = {
    "stacked": spec_of((2, 2, 24), (0, 1, 0), (2, 2, 24), (0, 1, 0)),
    "apart": spec_of(*[(1, 2, 24) if layer != 1 else (0, 1, 0) for layer in range(7)], constants=GEMMA),
    "first": spec_of((0, 1, 0), (0, 1, 8), (1, 1, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLES)
def test_layers_that_compute_nothing_are_left_out(name):
    model = random_model(HOLES[name])
    whole = without_empty_layers(model)
    widths = [layer for layer in model.spec.layers if layer.kv_heads or layer.mlp]
    assert list(whole.spec.layers) == widths
    assert len(whole.segments) == len(whole.spec.segments), "neighbours that are alike are stacked"
    tokens = jnp.asarray(random_tokens(2, 16))
    np.testing.assert_allclose(whole(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert without_empty_layers(whole) is whole
    if name == "apart":  # layers keep their own view of positions: the sixth, now the fifth, sees all of them
        assert whole.constants.apart.layers == (0, 1, 2, 3, 5)
        wrong = jax.tree.map(lambda x: x, whole)
        wrong.constants = GEMMA
        assert not np.allclose(wrong(tokens), model(tokens), atol=1e-3)


def test_biases_of_an_empty_layer_stay():
    model = random_model(dataclasses.replace(HOLES["first"], output_biases=True))
    assert without_empty_layers(model) is model
