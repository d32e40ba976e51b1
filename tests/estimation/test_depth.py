"""Depth pruning is the same search: sub-blocks that barely turn the residual stream are found, and skipped."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import select_units
from saap_jax.estimation import make_estimators, observe, score
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_units, masks
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES, Keep, Scores
from tests.helpers import changed, dense_model, forward, length_mask, random_tokens

LAYERS = 4
TOKENS, MASK = random_tokens(4, 8), length_mask(8, 6, 8, 5, seq=8)
UNITS = "within(min_keep=0) > global(by={})"
DEPTH = "within(depth=True, min_keep=0) > global(by={})"
CHOICES = [
    {"attention": (1, 3), "mlp": (2, 3)},
    {"attention": (0,), "mlp": (1, 2)},
    {"attention": (0, 1, 2), "mlp": ()},
]
"""Layers whose attention, and whose MLP, is nearly the identity: together, one of the two, the ends, most of a kind."""


def scaled(model: Llama, chosen: dict[str, tuple[int, ...]], factor: float) -> Llama:
    """Return a copy in which what the chosen sub-blocks write is multiplied by `factor`."""
    for name, structure in discover(model).items():
        rows = jnp.asarray(chosen[name], jnp.int32)
        model = changed(model, f"segments/0/{structure.writer.path}", lambda w, rows=rows: w.at[rows].multiply(factor))
    return model


def without(chosen: dict[str, tuple[int, ...]]) -> Keep:
    """Return the keep-set that has all units but those of the chosen sub-blocks."""
    keep = existing_units(dense_model(layers=LAYERS).segments)
    for name, layers in chosen.items():
        keep[name][list(layers)] = False
    return keep


def share_of(chosen: dict[str, tuple[int, ...]], model: Llama) -> float:
    """Return the share of the prunable parameters that is in the chosen sub-blocks."""
    structures = discover(model)
    inside = sum(s.units[i] * s.parameters_per_unit[i] for name, s in structures.items() for i in chosen[name])
    return inside / prunable_parameters(structures)


def block_scores(model: Llama, text: str = "block_influence") -> Scores:
    estimators = make_estimators([text])
    return score(estimators, observe(model, [(TOKENS, MASK)], estimators[text].needs), model)[text]


def searched(model: Llama, scores: Scores, ratio: float, method: str = DEPTH, by: str = "score_per_parameter") -> Any:
    return select_units(model, scores, ratio, method.format(by))


def equal(first: Keep, second: Keep) -> bool:
    return all((first[name] == second[name]).all() for name in STRUCTURES)


@pytest.mark.slow
@pytest.mark.parametrize("rank_by", ["score", "score_per_parameter"])
@pytest.mark.parametrize("chosen", CHOICES)
def test_just_the_sub_blocks_that_are_nearly_the_identity_go(chosen, rank_by):
    model = scaled(dense_model(layers=LAYERS), chosen, 1e-3)
    scores, ratio = block_scores(model), share_of(chosen, model)
    selection = searched(model, scores, ratio, by=rank_by)
    assert equal(selection.keep, without(chosen))
    assert selection.actual == pytest.approx(ratio, rel=1e-12)
    # the same ranking where a unit can go by itself
    assert equal(searched(model, scores, ratio, UNITS, rank_by).keep, selection.keep)
    structures = discover(model)
    unit = min(structures[name].parameters_per_unit[0] for name in STRUCTURES if chosen[name])
    less = (selection.removed - unit) / prunable_parameters(structures)
    assert equal(searched(model, scores, less, by=rank_by).keep, selection.keep)
    assert searched(model, scores, less, UNITS, rank_by).removed == selection.removed - unit


def test_the_choice_follows_the_construction():
    """With other sub-blocks nearly the identity, or none, others go; a score a layer cannot tell attention from MLP."""
    chosen = CHOICES[1]
    for other in (dict.fromkeys(STRUCTURES, ()), CHOICES[0]):
        model = scaled(dense_model(layers=LAYERS), other, 1e-3)
        assert not equal(searched(model, block_scores(model), share_of(chosen, model)).keep, without(chosen))
    model = scaled(dense_model(layers=LAYERS), chosen, 1e-3)
    scores = block_scores(model, "block_influence(granularity='layer')")
    assert not equal(searched(model, scores, share_of(chosen, model)).keep, without(chosen))


@pytest.mark.slow
def test_the_cut_model_skips_them():
    chosen = CHOICES[0]
    model = scaled(dense_model(layers=LAYERS), chosen, 1e-3)
    selection = searched(model, block_scores(model), share_of(chosen, model))
    pruned = cut(model, selection.keep)
    widths = [(layer.kv_heads, layer.mlp) for layer in pruned.spec.layers]
    assert widths == [(2 * (i not in chosen["attention"]), 6 * (i not in chosen["mlp"])) for i in range(LAYERS)]
    assert count_parameters(pruned) == count_parameters(model) - selection.removed
    dense, masked = (np.asarray(forward(model, TOKENS, g)) for g in (None, masks(selection.keep)))
    np.testing.assert_allclose(forward(pruned, TOKENS), masked, rtol=0, atol=2e-5)
    # nothing of a sub-block that is gone is computed: broken weights in it show in the masked model only
    broken = scaled(model, chosen, np.nan)
    np.testing.assert_array_equal(forward(cut(broken, selection.keep), TOKENS), forward(pruned, TOKENS))
    assert np.isnan(np.asarray(forward(broken, TOKENS, masks(selection.keep)))).all()
    # what they wrote was small, so the logits stay; those of other sub-blocks do not
    assert np.abs(masked - dense).max() < 2e-2
    others = {name: tuple(i for i in range(LAYERS) if i not in layers) for name, layers in chosen.items()}
    assert np.abs(np.asarray(forward(model, TOKENS, masks(without(others)))) - dense).max() > 0.5
