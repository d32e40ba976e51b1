"""Runs: whole-model trees are cut at the runs' bounds and joined again."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.segments import existing_units, join_segments, segment_bounds, split_gates
from tests.helpers import ragged_model


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (3,)])
def test_join_undoes_split(batch):
    bounds = segment_bounds(ragged_model().segments)
    exists = existing_units(ragged_model().segments)
    gates = {n: jnp.arange(u.size, dtype=jnp.float32).reshape(u.shape) + 1 for n, u in exists.items()}
    batched = {n: jnp.broadcast_to(g, (*batch, *g.shape)) for n, g in gates.items()}
    pieces = split_gates(batched, bounds)
    assert [piece["mlp"].shape for piece in pieces] == [(2, *batch, 6), (1, *batch, 3), (1, *batch, 5)]
    first = pieces if not batch else [{n: g[:, 1] for n, g in piece.items()} for piece in pieces]
    for fill in (0.0, np.nan):
        joined = join_segments(first, fill=fill)
        for name, gate in gates.items():
            np.testing.assert_array_equal(joined[name], np.where(exists[name], gate, fill))
