"""Scales of units: the divergence and its gradient by plain algebra, exact folding, and what held-out text decides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saap_jax.data.windows import Windows
from saap_jax.llama.segments import existing_units, masks
from saap_jax.steps.base import Context, State
from saap_jax.steps.limits import Within
from saap_jax.steps.repair.scales import Scales
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from saap_jax.surgery.divergence import folded
from saap_jax.types import STRUCTURES
from tests.divergence import batches_of, plain_divergence
from tests.helpers import changed, dense_model, forward, ragged_model, random_keep, random_tokens

STEPS, RATE = 12, 0.03
TOKENS = jnp.asarray(random_tokens(2, 6, seed=9))


def pruned(model, share: float = 0.4):
    return random_keep(existing_units(model.segments), share)


class Caught(LlamaSubject):
    """A model that shows the factors that are folded into it."""

    found: list = []  # noqa: RUF012

    def folded(self, scales):
        self.found.append(scales)
        return super().folded(scales)


def scaled(model, teacher, keep, batches, steps: int, rate: float):
    """Return the model with factors folded in, the factors, and the divergences."""
    text = Windows(*(np.concatenate(each) for each in zip(*batches, strict=True)))
    on = Context(dense=LlamaSubject(teacher), scenarios={"text": text}, ratio=0.4, final=0.4, batch_size=2)
    state = Scales(steps, rate)(State(Caught(model), keep, Within()), on)
    return state.subject.model, Caught.found.pop(), state.metrics["scaled"]


def gates_of(keep, scales):
    """Scales of what is kept, in their own type."""
    return {name: jnp.asarray(keep[name], value.dtype) * value for name, value in scales.items()}


@pytest.mark.slow
@pytest.mark.parametrize("build", [dense_model, ragged_model])
def test_factors_are_those_of_plain_steps_of_adam(build, x64):
    """On gates, in 64 bits, from the logits of both: after each round the same divergence of what is held out."""
    model = build(dtype=np.float64)
    keep, batches = pruned(model), batches_of()
    batches[3] = batches[0]  # so that what is learnt holds on what is held out
    _, made, divergences = scaled(model, model, keep, batches, STEPS, RATE)
    order, scales = np.random.default_rng(0), {name: np.ones(units.shape) for name, units in keep.items()}
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    found = [scales]

    @jax.jit
    def gradient(scales, tokens, mask):
        def mean(scales):
            known, own = (jax.nn.log_softmax(model(tokens, g), axis=-1) for g in (None, gates_of(keep, scales)))
            each = (jnp.exp(known) * (known - own)).sum(-1)
            return jnp.where(mask, each, 0).sum() / mask.sum()

        return jax.grad(mean)(scales)

    with jax.enable_x64(True):
        state = optimiser.init(jax.tree.map(jnp.asarray, scales))
        for _ in range(STEPS // 3):
            for number in order.permutation(3):
                with jax.numpy_dtype_promotion("standard"):
                    updates, state = optimiser.update(gradient(scales, *map(jnp.asarray, batches[number])), state)
                scales = optax.apply_updates(scales, updates)
            found.append(scales)
    judged = [plain_divergence(model, model, gates_of(keep, s), batches[3:]) for s in found]
    np.testing.assert_allclose(divergences, judged, rtol=1e-4)
    best = found[int(np.argmin(judged))]
    assert int(np.argmin(divergences)) == int(np.argmin(judged)) > 0
    for name in best:
        np.testing.assert_allclose(made[name], best[name], rtol=0, atol=1e-4)
        assert (made[name][~keep[name]] == 1).all()
        assert np.abs(made[name] - 1).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("build", [dense_model, ragged_model])
def test_folded_factors_are_gates(build, x64):
    model = build(dtype=np.float64)
    keep = pruned(model)
    random = np.random.default_rng(3)
    scales = {name: random.uniform(0.5, 1.5, keep[name].shape) for name in STRUCTURES}
    new = folded(model, scales)
    gates = {name: jnp.asarray(kept * scales.get(name, 1.0)) for name, kept in keep.items()}
    expected = np.asarray(forward(model, TOKENS, gates))
    np.testing.assert_allclose(forward(new, TOKENS, masks(keep)), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(forward(cut(new, keep), TOKENS), expected, rtol=0, atol=1e-12)
    assert np.abs(expected - np.asarray(forward(model, TOKENS, masks(keep)))).max() > 1e-3


@pytest.mark.slow
def test_a_factor_that_was_lost_is_found_again():
    """Half of what a unit writes is missing: its factor goes towards 2, and the divergence falls."""
    teacher = dense_model()
    halved = changed(teacher, "segments/0/mlp/down", lambda value: value.at[1, 2].multiply(0.5))
    keep = existing_units(teacher.segments)
    new, made, divergences = scaled(halved, teacher, keep, batches_of(8), 120, 0.05)
    assert made["mlp"][1, 2] == pytest.approx(2, abs=0.2)
    assert min(divergences) < 0.1 * divergences[0]
    text = batches_of(2, seed=7)
    before, after = (plain_divergence(each, teacher, None, text) for each in (halved, new))
    assert after < 0.2 * before


@pytest.mark.slow
@pytest.mark.parametrize(("share", "rate"), [(0.4, 50.0), (0.0, RATE)])
def test_factors_that_do_harm_on_held_out_text_are_not_taken(share, rate):
    """And nothing is learnt where nothing is gone."""
    model = dense_model()
    keep = pruned(model, share) if share else existing_units(model.segments)
    new, made, divergences = scaled(model, model, keep, batches_of(), 6, rate)
    assert min(divergences) == divergences[0]
    assert (divergences[0] == pytest.approx(0, abs=1e-9)) == (not share)
    assert all((values == 1).all() for values in made.values())
    np.testing.assert_array_equal(forward(new, TOKENS, masks(keep)), forward(model, TOKENS, masks(keep)))
