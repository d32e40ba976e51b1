"""The divergence with layers in front that run once: their derivatives alone are left out."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.llama.segments import existing_units
from saap_jax.steps.refinement.learn import hard
from saap_jax.surgery.divergence import Divergence
from tests.divergence import batches_of
from tests.helpers import RELATIVES, changed, dense_model, ragged_model, random_keep, random_model, spec_of

FIRST = 2


def apart_model(**options):
    """A model whose last layer has a window of its own."""
    constants = RELATIVES["gemma3_text"]
    apart = dataclasses.replace(constants, apart=dataclasses.replace(constants.apart, layers=(3,)))
    return random_model(spec_of(*[(2, 6)] * 4, constants=apart), **options)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(dense_model, layers=4),
        pytest.param(ragged_model, marks=pytest.mark.slow),
        pytest.param(apart_model, marks=pytest.mark.slow),
    ],
)
def test_layers_in_front_that_run_once_change_no_other_derivative(make, x64):
    teacher = make(dtype=np.float64)
    model = changed(teacher, "segments/0/attention/output", lambda value: value.at[0].multiply(1.5))  # also in front
    keep, batches = random_keep(existing_units(model.segments), 0.4), batches_of()
    for name, existing in existing_units(model.segments).items():
        keep[name][:FIRST] = existing[:FIRST]
    whole, behind = (Divergence(model, batches, 0.3, teacher, first) for first in (0, FIRST))
    (value, all_of), (same, some) = (each.gradient(hard(keep), 1) for each in (whole, behind))
    assert same == pytest.approx(value, rel=1e-5)
    assert behind.judge(keep) == pytest.approx(whole.judge(keep), rel=1e-5)
    for name, slopes in some.items():
        np.testing.assert_allclose(slopes[FIRST:], all_of[name][FIRST:], rtol=1e-4, atol=1e-8)
        assert not slopes[:FIRST].any()
        assert np.abs(all_of[name][:FIRST]).max() > 1e-3, "control: there is one"
    keep["mlp"][0, 0] = False
    assert whole.judge(keep) != pytest.approx(behind.judge(keep), rel=1e-3), "control: nothing may change in front"


@pytest.mark.parametrize(("protect", "first"), [((0, 1), 2), ((1,), 0)])
def test_steps_leave_out_what_is_in_front_of_the_first_prunable_layer(protect, first, monkeypatch):
    model, asked, gradient = dense_model(layers=3), [], Divergence.gradient
    monkeypatch.setattr(Divergence, "gradient", lambda self, *at: asked.append(self.first) or gradient(self, *at))
    batches = batches_of(3)
    text = Windows(*(np.concatenate(parts) for parts in zip(*batches, batches[0], strict=True)))  # held out: seen
    chain = f"random > within(protect={protect}, min_keep=0) > uniform > learn(1) > scales(6, rate=0.05)"
    scaled: Any = saap_jax.run_chain(model, chain, text, 0.2, batch_size=2)
    assert asked == [first] * 7
    assert min(told := scaled.metrics["scaled"]) < told[0]
    before, after = (each.segments[0].attention.output[...].reshape(3, -1) for each in (model, scaled.subject.model))
    np.testing.assert_array_equal(np.abs(np.asarray(after - before)).max(axis=1) > 0, np.arange(3) >= first)
