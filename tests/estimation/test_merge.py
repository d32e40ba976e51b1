"""Statistics of the parts of a text make those of the whole, however it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_jax.estimation import (
    BLOCK_CHANGE,
    GATE_GRADIENT,
    GRAM,
    SQUARED_WEIGHT_GRADIENT,
    WEIGHT_GRADIENT,
    Curvature,
    Statistics,
    merge,
    observe,
)
from saap_jax.estimation.base import Plan
from tests.helpers import PLAIN, dense_model, length_mask, random_model, random_tokens, spec_of

LENGTHS = (8, 3, 1, 6, 8)
TOKENS, MASK = random_tokens(5, 8), length_mask(*LENGTHS, seq=8)
ALL = PLAIN


@functools.cache
def parts() -> tuple[Statistics, list[Statistics]]:
    """Return the statistics of the whole text, and those of each example by itself."""
    model, curvature = random_model(spec_of((2, 4), (2, 4))), Curvature(probes=2)
    batches = [(TOKENS[n : n + 1], MASK[n : n + 1]) for n in range(5)]
    padding = [(TOKENS[:1], np.zeros((1, 8), bool))] * 5
    # an example of one token predicts nothing, so it cannot be a pass of its own; as many rows are one program
    whole, *alone = (
        observe(model, (part + padding)[:5], ALL, curvature=curvature)
        for part in (batches, batches[:1], batches[1:3], batches[3:4], batches[4:])
    )
    return whole, alone


def merged_by(cuts: list[int], pieces: list[Statistics]) -> Statistics:
    """Merge neighbours, in the order that `cuts` draws."""
    pieces = list(pieces)
    for cut in cuts:
        at = cut % (len(pieces) - 1)
        pieces[at : at + 2] = [merge(pieces[at], pieces[at + 1])]
    assert len(pieces) == 1
    return pieces[0]


def without_holding_out(statistics: Statistics) -> Statistics:
    """Add what is held out of the Gram matrices to the rest: which microbatches that are depends on the parts."""
    gram = jax.tree.map(lambda x: x.sum(axis=0), statistics.values[GRAM])
    return statistics._replace(values={**statistics.values, GRAM: gram})


def assert_equal(first: Statistics, second: Statistics) -> None:
    first, second = without_holding_out(first), without_holding_out(second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), first, second)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_any_order_of_merging_gives_the_whole(cuts):
    whole, alone = parts()
    assert_equal(merged_by(cuts, alone), whole)


@pytest.mark.slow
def test_counts_and_rows():
    whole, alone = parts()
    both = merge(alone[1], alone[2])
    assert (int(both.examples), int(both.tokens), int(both.seen)) == (3, 7, 10)
    assert both.values[GATE_GRADIENT]["mlp"].shape == (3, 2, 4)
    np.testing.assert_allclose(both.losses, whole.losses[1:4], rtol=1e-5)
    assert int(whole.seen) == sum(LENGTHS)


def test_means_are_weighted_by_what_they_are_means_over():
    """By hand: tokens 1 and 3, examples 1 and 1, real tokens 2 and 4."""
    keys = (WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT, BLOCK_CHANGE)
    first, second = (
        Statistics(jnp.asarray(1), jnp.asarray(tokens), jnp.zeros(1), {key: jnp.asarray([value]) for key in keys})
        for tokens, value in ((1, 0.0), (3, 12.0))
    )
    values = merge(first, second).values
    assert [float(values[key][0]) for key in keys] == pytest.approx([9, 6, 8])


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    _, (first, second, *_) = parts()
    fewer = second._replace(values={GATE_GRADIENT: second.values[GATE_GRADIENT]})
    with pytest.raises(
        ValueError, match=r"merge: expected the same statistics in both parts, got activation_moments, "
    ):
        merge(first, fewer)
    model, plan = dense_model(layers=3), Plan(5, Curvature(probes=2))
    for statistic in ALL:
        one, two = (
            part._replace(values={statistic: value})
            for part, value in ((first, first.values[statistic]), (second, statistic.init(model, plan)))
        )
        with pytest.raises(ValueError, match=f"merge: statistic {statistic.name} has other shapes"):
            merge(one, two)
