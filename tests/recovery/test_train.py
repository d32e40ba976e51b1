"""One step of training: the gradient, what moves and what does not, microbatches, and trouble."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saap_jax.recovery.adapters import full
from saap_jax.recovery.objective import Objective, sums_of
from saap_jax.recovery.train import (
    Schedule,
    held_out_step,
    join,
    learning_rate_of,
    microbatches,
    split,
    start,
    train_step,
)
from tests.helpers import changed, dense_model, ragged_model
from tests.recovery.helpers import LORA_LIKE, Adapter, packed, regular_rows, rows_of

SCHEDULE = Schedule(learning_rate=1e-2, warmup=2, steps=40)
BATCH = rows_of(5, 7, 4, 9, 12, 11).arrays()
KEY = jax.random.key(0)
FULL, PLAIN = full(), Objective()


def run(model, method=FULL, *, steps=1, size=5, objective=PLAIN, schedule=SCHEDULE, batch=BATCH, teacher=None):
    """Return the state after some steps on one batch, its frozen part, and what the steps told."""
    trained, frozen = split(method.prepare(model, KEY), method.trainable, teacher)
    state, told = start(trained, schedule), []
    for _ in range(steps):
        state, measured = train_step(state, frozen, microbatches(batch, size), objective=objective, schedule=schedule)
        told.append(measured)
    return state, frozen, told


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences(x64):
    """Along a random direction through the trainable parameters, in double precision."""
    model = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), dense_model())
    prepared = LORA_LIKE.prepare(model, KEY)
    trained, frozen = split(prepared, Adapter)
    trained = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) + 0.1, trained)
    rows = packed(rows_of(5, 7, 4))

    @jax.jit
    def loss(trained):
        return sums_of(join(trained, frozen), None, rows, Objective()).loss

    random = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape)), trained)
    gradient = jax.jit(jax.grad(loss))(trained)
    along = sum(
        float((g * d).sum()) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    ends = [loss(jax.tree.map(lambda x, d, sign=sign: x + sign * 1e-5 * d, trained, direction)) for sign in (1, -1)]
    np.testing.assert_allclose(float(ends[0] - ends[1]) / 2e-5, along, rtol=1e-6)
    assert abs(along) > 0.1


def test_only_what_is_trainable_moves():
    """Frozen parameters stay to the last bit; they have no gradient and no optimiser state."""
    model = ragged_model()
    before = leaves(model)
    state, frozen, told = run(model, LORA_LIKE, steps=5)
    assert float(told[-1].loss) < float(told[0].loss)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.trained)) == 8 * 2 + 2
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * (8 * 2 + 2)
    for old, new in zip(before, leaves(frozen.parameters), strict=True):
        np.testing.assert_array_equal(old, new)


def test_microbatches_change_nothing():
    """The mean is over tokens: microbatches with few and many targets count by them."""
    whole, halves = (run(dense_model(), LORA_LIKE, size=size, steps=3)[2] for size in (5, 1))
    for one, other in zip(whole, halves, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
        np.testing.assert_allclose(one.norm, other.norm, rtol=1e-4)
        assert int(one.tokens) == int(other.tokens) == BATCH["targets"].sum()
    trained, frozen = split(dense_model(), nnx.Param)
    each = [jax.tree.map(lambda x, n=n: x[n], microbatches(BATCH, 1)) for n in range(5)]
    found = [held_out_step(trained, frozen, rows, objective=PLAIN) for rows in each]
    losses, counts = (np.array(values, float) for values in zip(*found, strict=True))
    np.testing.assert_allclose(whole[0].loss, losses.sum() / counts.sum(), rtol=1e-5)
    assert abs((losses / counts).mean() - losses.sum() / counts.sum()) > 5e-4


@pytest.mark.slow
def test_the_first_step_by_hand():
    """By hand: the mean loss's gradient, clipped; the first step of Adam is its sign.

    All parameters move.
    """
    schedule = SCHEDULE._replace(warmup=0, clip=0.1)
    state, frozen, told = run(dense_model(), schedule=schedule)
    trained, _ = split(dense_model(), nnx.Param)
    rows = packed(rows_of(5, 7, 4, 9, 12, 11))
    gradient = jax.jit(
        jax.grad(lambda t: sums_of(join(t, frozen), None, rows, Objective()).loss / float(BATCH["targets"].sum()))
    )(trained)
    gradients, parameters, norm = leaves(gradient), leaves(trained), float(told[0].norm)
    np.testing.assert_allclose(norm, np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients)), rtol=1e-5)
    assert norm > 0.1
    for g, p, moved in zip(gradients, parameters, leaves(state.trained), strict=True):
        g = g * (0.1 / norm)
        expected = p - 1e-2 * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=2e-5)
        assert (moved != p).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "measure", "share"),
    [
        (PLAIN, "loss", 0.5),
        (Objective(distillation=1.0, temperature=2.0), "divergence", 0.5),
        (Objective(distillation=1.0, temperature=1.0, hidden=10.0), "distance", 0.8),
    ],
)
def test_what_is_minimised_falls(objective, measure, share):
    """Of sequences where each token follows from the one before, and of a teacher."""
    schedule, batch = Schedule(learning_rate=2e-2, warmup=5, steps=30), regular_rows(8).arrays()
    teacher = dense_model(seed=1) if objective.taught else None
    *_, told = run(
        dense_model(), steps=30, size=8, objective=objective, schedule=schedule, batch=batch, teacher=teacher
    )
    assert float(getattr(told[-1], measure)) < share * float(getattr(told[0], measure))


def test_the_second_step_compiles_nothing():
    run(dense_model(), LORA_LIKE, steps=1)
    before = train_step._cache_size()
    run(dense_model(seed=3), LORA_LIKE, steps=3)
    assert train_step._cache_size() == before
    run(dense_model(layers=3), LORA_LIKE, steps=1)
    assert train_step._cache_size() == before + 1


def test_the_state_is_donated_and_the_initial_parameters_are_not():
    trained, frozen = split(LORA_LIKE.prepare(dense_model(), KEY), Adapter)
    state = start(trained, SCHEDULE)
    options = {"objective": PLAIN, "schedule": SCHEDULE}
    train_step(state, frozen, microbatches(BATCH, 5), **options)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trained, frozen.parameters)))


def test_a_step_that_is_not_finite_changes_nothing():
    model = changed(dense_model(), "segments/0/mlp/down", lambda x: x.at[0, 0, 0].set(jnp.inf))
    state, _, told = run(model, LORA_LIKE)
    assert not bool(told[0].finite)
    trained, _ = split(LORA_LIKE.prepare(model, KEY), Adapter)
    for old, new in zip(leaves(start(trained, SCHEDULE)), leaves(state), strict=True):
        np.testing.assert_array_equal(old, new)
    assert bool(run(dense_model(), LORA_LIKE)[2][0].finite)


def test_narrow_parameters_are_trained_in_float32():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense_model())
    trained, frozen = split(model, nnx.Param)
    state = start(trained, SCHEDULE)
    options = {"objective": Objective(compute="bfloat16"), "schedule": SCHEDULE}
    step = functools.partial(train_step, **options)
    moved, told = jax.eval_shape(step, state, frozen, microbatches(BATCH, 5))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.trained, moved.trained))} == {jnp.dtype("float32")}
    assert told.loss.dtype == jnp.float32


def test_the_learning_rate():
    """It rises in the warm-up, and falls to 0 along half a cosine."""
    rates = [float(learning_rate_of(SCHEDULE)(step)) for step in range(SCHEDULE.steps + 1)]
    expected = [0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(39) / 38)))]
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), atol=1e-8)
