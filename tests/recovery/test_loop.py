"""Training from beginning to end: checks, stopping, going on, and what is said of trouble."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saap_jax.config.recover import TrainingConfig
from saap_jax.recovery.checkpoints import Checkpoints, arrays_of
from saap_jax.recovery.loop import NotFiniteError, Training, held_out_loss, train
from saap_jax.recovery.objective import Objective, sums_of
from saap_jax.recovery.train import Schedule, join, split, start
from tests.helpers import changed, dense_model, ragged_model
from tests.recovery.helpers import LORA_LIKE, packed, regular_rows, rows_of

PLAN = TrainingConfig(batch_size=4, microbatch=2, epochs=4, check_every=3, patience=0, seed=0)
ROWS, HELD, IRREGULAR = regular_rows(9), regular_rows(3), rows_of(12, 12, seed=8)


def training_of(model=None, *, plan=PLAN, rows=ROWS, held_out=HELD, steps=9, compute="float32", rate=5e-2, about=None):
    prepared = LORA_LIKE.prepare(dense_model() if model is None else model, jax.random.key(0))
    trained, frozen = split(prepared, LORA_LIKE.trainable)
    schedule = Schedule(learning_rate=rate, warmup=1, steps=steps)
    return Training(trained, frozen, rows, held_out, Objective(compute), schedule, plan, about or {"name": "a"})


def run(directory, training, *, stop=None):
    """Train; with `stop`, as if killed after that step. Return the outcome and what the steps told."""
    told = []

    def done(step):
        told.append(step)
        if step.step == stop:
            raise KeyboardInterrupt

    with Checkpoints(directory) as checkpoints:
        if stop is None:
            return train(training, checkpoints, done=done), told
        with pytest.raises(KeyboardInterrupt):
            train(training, checkpoints, done=done)
    return None, told


def steps_in(checkpoints) -> list[int]:
    checkpoints.wait()
    return sorted(checkpoints._manager.all_steps())


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_parameters(tmp_path):
    """To the last bit, the losses of the steps too; a training from another seed does not."""
    whole, told = run(tmp_path / "whole", training_of())
    assert [step.step for step in told] == list(range(1, 10))
    run(tmp_path / "killed", training_of(), stop=4)
    run(tmp_path / "killed", training_of(), stop=7)
    outcome, rest = run(tmp_path / "killed", training_of())
    assert [step.step for step in rest] == [7, 8, 9]
    assert same(outcome.trained, whole.trained)
    assert [step.loss for step in rest] == [step.loss for step in told[6:]]
    assert [step.held_out for step in rest] == [step.held_out for step in told[6:]]
    assert outcome[1:] == whole[1:]
    again, nothing = run(tmp_path / "killed", training_of())
    assert same(again.trained, whole.trained)
    assert not nothing
    other, _ = run(tmp_path / "other", training_of(plan=dataclasses.replace(PLAN, seed=1)))
    assert not same(other.trained, whole.trained)


def test_the_best_parameters_are_returned_and_kept(tmp_path):
    """The held-out text follows no rule: learning one makes its loss rise, and the lowest loss decides."""
    training = training_of(rate=0.5, held_out=IRREGULAR)
    outcome, told = run(tmp_path, training)
    checked = {step.step: step.held_out for step in told if step.held_out is not None}
    assert list(checked) == [3, 6, 9]
    assert outcome.best_step == min(checked, key=checked.__getitem__) != 9
    assert outcome.best_loss == checked[outcome.best_step]
    assert held_out_loss(outcome.trained, training) == pytest.approx(outcome.best_loss, abs=0)
    with Checkpoints(tmp_path) as checkpoints:
        assert steps_in(checkpoints) == sorted({6, 9, outcome.best_step})


def test_a_step_that_nobody_heard_of_is_made_again(tmp_path):
    """As on a full disk, where the line of a step cannot be written: its checkpoint comes behind it."""

    def deaf(told):
        if told.step == 3:
            raise KeyboardInterrupt

    with Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyboardInterrupt):
        train(training_of(steps=6), checkpoints, done=deaf)
    assert [step.step for step in run(tmp_path, training_of(steps=6))[1]] == [1, 2, 3, 4, 5, 6]


def test_the_best_checkpoint_outlives_a_kill_behind_it(tmp_path):
    training = training_of(rate=0.5, held_out=IRREGULAR, plan=dataclasses.replace(PLAN, check_every=1))
    whole, _ = run(tmp_path / "whole", training)
    assert whole.best_step < 6, "two checks come between it and the kill"
    run(tmp_path / "killed", training, stop=7)
    outcome, _ = run(tmp_path / "killed", training)
    assert outcome[1:] == whole[1:]
    assert same(outcome.trained, whole.trained)
    with Checkpoints(tmp_path / "killed") as checkpoints:
        assert steps_in(checkpoints) == [whole.best_step, 8, 9]


def test_patience_ends_it(tmp_path):
    training = training_of(rate=0.5, held_out=IRREGULAR, plan=dataclasses.replace(PLAN, patience=1))
    outcome, told = run(tmp_path, training)
    assert outcome.stopped
    assert outcome.steps == len(told) == 6
    again, nothing = run(tmp_path, training)
    assert (again.steps, again.stopped, nothing) == (6, True, [])


@pytest.mark.slow
def test_the_held_out_loss_is_the_mean_of_its_tokens():
    training = training_of(held_out=rows_of(5, 9, 7))
    model = join(training.initial, training.frozen)
    found = jax.jit(lambda m: sums_of(m, None, packed(training.held_out), Objective()))(model)
    np.testing.assert_allclose(held_out_loss(training.initial, training), found.loss / float(found.tokens), rtol=1e-6)


def test_without_held_out_text_the_last_parameters_count(tmp_path):
    outcome, told = run(tmp_path, training_of(held_out=None, steps=4))
    assert (outcome.best_step, outcome.best_loss, outcome.steps) == (None, None, 4)
    assert all(step.held_out is None for step in told)
    with Checkpoints(tmp_path) as checkpoints:
        assert steps_in(checkpoints) == [3, 4]
        saved = checkpoints.read(4, start(training_of().initial, training_of().schedule))
    assert same(saved.trained, outcome.trained)


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(tmp_path):
    run(tmp_path, training_of(steps=3))
    with pytest.raises(ValueError, match="checkpoint 3 is of another training: name a -> b; start anew"):
        run(tmp_path, training_of(steps=3, about={"name": "b"}))


def test_a_checkpoint_holds_the_trained_parameters_only(tmp_path):
    training = training_of(steps=3)
    run(tmp_path, training)
    names = arrays_of(start(training.initial, training.schedule))
    with Checkpoints(tmp_path) as checkpoints:
        progress = checkpoints.progress(3)
    assert set(progress) >= {"iterator", "best_loss", "best_step", "waited", "name"}
    assert progress["iterator"] == {"next_index": 3}
    assert sum(array.size for array in names.values()) == 3 * 18 + 3  # parameters, two moments, three counts
    assert not any("mlp" in name for name in names)


@pytest.mark.slow
def test_empty_arrays_survive_a_checkpoint(tmp_path):
    """A layer without attention has arrays of no size, which orbax refuses to write."""
    trained, _ = split(ragged_model(), nnx.Param)
    state = start(trained, Schedule())
    assert any(leaf.size == 0 for leaf in jax.tree.leaves(state))
    other = jax.tree.map(jnp.zeros_like, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        found = checkpoints.read(0, other)
        assert same(found, state)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        fewer = start(split(LORA_LIKE.prepare(ragged_model(), jax.random.key(0)), LORA_LIKE.trainable)[0], Schedule())
        with pytest.raises(ValueError, match="expected a whole checkpoint of the parameters that are trained now"):
            checkpoints.read(0, fewer)


def trouble(directory, training) -> str:
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(NotFiniteError) as error:
            train(training, checkpoints)
        assert "\n" not in str(error.value)
        step = int(str(error.value).split("of step ")[1].split()[0])
        assert checkpoints.latest == step - 1
        saved = checkpoints.read(step - 1, start(training.initial, training.schedule))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(saved))
        assert checkpoints.progress(step - 1)["iterator"] == {"next_index": step - 1}
    return str(error.value)


def test_a_broken_model_is_named(tmp_path):
    model = changed(dense_model(), "segments/0/mlp/down", lambda x: x.at[0, 0, 0].set(jnp.nan))
    said = trouble(tmp_path, training_of(model))
    assert "the loss of step 1 is not finite, on the rows " in said
    assert "(piece " in said
    assert "saved as checkpoint 0" in said
    assert "the model has numbers that are not finite, in segments/0/mlp/down" in said


def test_activations_that_overflow_are_named(tmp_path):
    model = changed(dense_model(), "unembedding", lambda x: x * 1e38)
    model = changed(model, "norm", lambda x: x * 1e3)
    assert "its activations or its gradient overflow; lower" in trouble(tmp_path, training_of(model))
