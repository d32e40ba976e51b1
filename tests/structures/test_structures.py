"""Coupled structures: the members that LLaMA has, and counts that agree with cutting one unit."""

import functools

import jax.numpy as jnp
import pytest
from flax import nnx

from saap_jax.llama.model import abstract_llama
from saap_jax.llama.segments import existing_units
from saap_jax.structures.discovery import count_parameters, discover, prunable_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from tests.helpers import HEADS, dense_model, ragged_model, random_keep, relative

MODELS = {
    **{f"{heads}-{'tied' if tied else 'untied'}": functools.partial(dense_model, heads, tied=tied)
       for heads in HEADS for tied in (True, False)},
    "ragged": ragged_model,
    "biases": functools.partial(relative, "qwen2", (2, 6), (1, 3)),
    "output biases": functools.partial(dense_model, output_biases=True),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_counts_are_those_of_the_cut_model(model, share):
    subject, keep = LlamaSubject(model), random_keep(existing_units(model.segments), share)
    small, removed = cut(model, keep), subject.removed(keep)
    assert 0 < removed <= subject.prunable
    assert (removed == subject.prunable) == (not share)
    assert subject.parameters - removed == count_parameters(small)
    assert subject.prunable - removed == prunable_parameters(discover(small))
    assert subject.removed(subject.existing) == 0


def test_counts_by_hand():
    """embed 8, head_dim 4, two KV heads with two query heads each, six channels, vocabulary 24."""
    structures = discover(dense_model("gqa", layers=2, mlp=6))
    assert structures["attention"].parameters_per_unit == (8 * 4 * (2 + 1 + 1 + 2),) * 2
    assert structures["mlp"].parameters_per_unit == (3 * 8,) * 2
    assert prunable_parameters(structures) == 2 * (2 * 192 + 6 * 24)


def test_abstract_model_has_the_same_structures(model):
    abstract = abstract_llama(model.spec)
    assert discover(abstract) == discover(model)
    assert count_parameters(abstract) == count_parameters(model)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (nnx.Param(jnp.ones((2, 8, 6))), "parameter mlp/up: expected an axis name a dimension"),
        (nnx.Param(jnp.ones((2, 8, 6)), axes=("layers", "mlp")), "parameter mlp/up: expected an axis name a dimension"),
        (nnx.Param(jnp.ones((2, 8, 6)), axes=("layers", "kv_heads", "mlp")), "mlp/up: expected at most one prunable"),
        (nnx.Param(jnp.ones((2, 8, 5)), axes=("layers", "embed", "mlp")), "axis mlp: expected one size"),
    ],
)
def test_wrong_axes_are_refused(parameter, message):
    model = dense_model()
    discover(model)
    model.segments[0].mlp.up = parameter
    with pytest.raises(ValueError, match=message):
        discover(model)
