"""Models that have never heard of this library, pruned by the gradients of injected gates: better than at random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saap_jax.discovery.gates import all_ones, gated
from saap_jax.discovery.removal import keep_units
from saap_jax.discovery.smaller import smaller
from saap_jax.discovery.trace import trace
from tests.discovery.test_gates import drawn
from tests.models_for_tracing import EXAMPLES

EXAMPLES_OF_DATA, STEPS = 64, 300


def batches(example, random, count):
    """Return inputs like the example's, with more rows, and targets that depend on them: a random network's outputs."""
    many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), example.inputs)
    return drawn(many, random)


def trained(example, inputs, targets, params):
    """Return parameters after some steps of Adam on the squared error."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: jnp.square(example.function(p, *inputs) - targets).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(STEPS):
            params, state, _ = step(params, state)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "moe", "cross_attention", "linen_encoder", "nnx_decoder"])
def test_gate_taylor_removes_less_than_chance(name):
    """A quarter of every prunable structure that no norm spans goes; the cut program has the masked one's loss."""
    example, random = EXAMPLES[name](), np.random.default_rng(0)
    inputs = batches(example, random, EXAMPLES_OF_DATA)
    small = lambda leaf: leaf * 0.5  # noqa: E731
    teacher = jax.tree.map(small, drawn(example.params, np.random.default_rng(1)))
    targets = jax.jit(example.function)(teacher, *inputs)
    params = trained(example, inputs, targets, jax.tree.map(small, drawn(example.params, np.random.default_rng(2))))

    one = jax.tree.map(lambda leaf: leaf[:1], inputs)
    traced = trace(example.function, params, *one)
    structures = [structure for structure in traced.prunable if not structure.normalised]
    run, ones = gated(traced), all_ones(structures)

    def loss_of(gates, target, *row):
        out = run(gates, params, *jax.tree.map(lambda leaf: leaf[None], row))
        return jnp.square(out[0] - target).mean()

    losses = jax.jit(jax.vmap(loss_of, (None, 0, *[0] * len(inputs))))
    each = jax.jit(jax.vmap(jax.grad(loss_of), (None, 0, *[0] * len(inputs))))(ones, targets, *inputs)
    scores = {name: np.abs(gradient).mean(0) for name, gradient in each.items()}

    def keep_by(scores):
        return {s.name: scores[s.name].argsort(-1).argsort(-1) >= max(s.units // 4, 1) for s in structures}

    def masked(keep):
        return float(
            losses({name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}, targets, *inputs).mean()
        )

    dense = masked({name: np.ones_like(one, bool) for name, one in ones.items()})
    chosen = keep_by(scores)
    chance = [masked(keep_by({s: random.uniform(size=v.shape) for s, v in scores.items()})) for _ in range(8)]
    assert dense < masked(chosen) < np.mean(chance)

    cut = smaller(traced, chosen)
    less = keep_units(traced, chosen, params)
    rows = jax.vmap(lambda target, *row: jnp.square(cut(less, *(leaf[None] for leaf in row))[0] - target).mean())
    np.testing.assert_allclose(rows(targets, *inputs).mean(), masked(chosen), rtol=1e-4)
