"""What is counted against models that are cut: all parameters, prunable ones, and what one unit more takes along."""

import numpy as np
import pytest

from saap_jax.llama.segments import existing_query_heads, existing_units
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.surgery.counting import costs_left, kept_parameters
from saap_jax.surgery.cut import cut
from saap_jax.types import QUERY_HEADS, RESIDUAL, STRUCTURES
from tests.helpers import dense_model, ragged_model, random_model, spec_of

MODELS = {
    "grouped": lambda: random_model(spec_of((2, 10), (3, 7), (0, 5), q_per_kv=3)),
    "ragged": ragged_model,
    "biases": lambda: dense_model(output_biases=True),
}


def drawn(model, rng) -> dict[str, np.ndarray]:
    """Return a keep-set of all kinds of units, at least one of each where there are any."""
    keep = {name: units & (rng.random(units.shape) < 0.7) for name, units in existing_units(model.segments).items()}
    heads = np.zeros_like(existing_query_heads(model.segments))
    for layer, widths in enumerate(model.spec.layers):
        keep["attention"][layer, : min(1, widths.kv_heads)] = True
        left = int(rng.integers(1, widths.q_per_kv + 1))
        for head in np.flatnonzero(keep["attention"][layer]):
            chosen = rng.permutation(widths.q_per_kv)[:left]
            heads[layer, head * widths.q_per_kv + chosen] = True
    embed = rng.random((1, model.spec.embed)) < 0.7
    embed[0, 0] = True
    return keep | {QUERY_HEADS: heads, RESIDUAL: embed}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_the_cut_model(name, seed):
    model = MODELS[name]()
    keep = drawn(model, np.random.default_rng(seed))
    small = cut(model, keep)
    assert kept_parameters(model, keep) == (count_parameters(small), prunable_parameters(discover(small)))
    whole = kept_parameters(model, existing_units(model.segments))
    assert whole == (count_parameters(model), prunable_parameters(discover(model)))
    assert whole.all > kept_parameters(model, keep).all


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_unit_costs_what_the_cut_model_lacks_without_it(name):
    model = MODELS[name]()
    keep = drawn(model, np.random.default_rng(5))
    costs, before = costs_left(model, keep), prunable_parameters(discover(cut(model, keep)))
    for structure in (*STRUCTURES, RESIDUAL):
        for group in range(len(keep[structure])):
            for unit in np.flatnonzero(keep[structure][group])[:1]:
                less = {part: kept.copy() for part, kept in keep.items()}
                less[structure][group, unit] = False
                if structure == "attention":
                    per = model.spec.layers[group].q_per_kv
                    less[QUERY_HEADS][group, unit * per : (unit + 1) * per] = False
                if less[structure][group].any() or structure != RESIDUAL:
                    after = prunable_parameters(discover(cut(model, less)))
                    assert before - after == costs[structure][group], (structure, group)


def test_a_query_head_costs_its_columns_alone():
    """Of each KV head of a layer one goes: query and output (and a bias of queries), no key and no value."""
    model = random_model(spec_of((2, 10), (3, 7), q_per_kv=3))
    keep = existing_units(model.segments) | {QUERY_HEADS: existing_query_heads(model.segments)}
    costs, before = costs_left(model, keep), prunable_parameters(discover(model))
    assert (costs[QUERY_HEADS] < costs["attention"] / 3).all()
    for layer, widths in enumerate(model.spec.layers):
        less = keep[QUERY_HEADS].copy()
        less[layer, [head * 3 for head in range(widths.kv_heads)]] = False
        after = prunable_parameters(discover(cut(model, keep | {QUERY_HEADS: less})))
        assert before - after == widths.kv_heads * costs[QUERY_HEADS][layer]
