"""Widths that a format asks for, and what they cost."""

import dataclasses

import pytest

from saap_jax.discovery import count_parameters
from saap_jax.export.widths import added_parameters, deci_widths, uniform_widths
from saap_jax.llama import abstract_llama
from tests.export.models import EMPTY, RAGGED, SPECS, UNIFORM, spec_of


def tuples(layers):
    return [(layer.kv_heads, layer.q_per_kv, layer.mlp) for layer in layers]


def test_uniform_widths():
    assert tuples(uniform_widths(RAGGED)) == [(4, 2, 24)] * 4
    assert tuples(uniform_widths(EMPTY)) == [(2, 4, 40)] * 6
    assert uniform_widths(UNIFORM) == UNIFORM.layers
    assert tuples(uniform_widths(SPECS["nothing"])) == [(1, 1, 1)] * 2


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
    with pytest.raises(ValueError, match="at least 5 x 1 that divides .* 4, found none; choose --format ragged"):
        uniform_widths(spec_of((5, 1, 4), (1, 1, 4), embed=4))


def test_deci_widths():
    assert deci_widths(RAGGED) == RAGGED.layers
    assert tuples(deci_widths(EMPTY)) == [(1, 1, 8), (2, 3, 32), (0, 2, 32), (1, 1, 40), (0, 1, 9), (2, 1, 32)]
    assert [layer.kv_heads for layer in deci_widths(SPECS["empty_biased"])] == [1, 2, 1, 1, 1, 2]


@pytest.mark.parametrize("widen", [uniform_widths, deci_widths])
@pytest.mark.parametrize("name", SPECS)
def test_added_parameters_are_counted(widen, name):
    spec = SPECS[name]
    layers = widen(spec)
    wider = count_parameters(abstract_llama(dataclasses.replace(spec, layers=layers)))
    assert added_parameters(spec, layers) == wider - count_parameters(abstract_llama(spec))
