"""From a problem to a cut model: masked = cut, budgets met, copies alike, better than chance, refused in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.problem import cut
from saap_jax.trace.subject.subject import subject_of
from tests.models_for_tracing import EXAMPLES
from tests.trace.subject.problems import (
    MIXED,
    calibrate,
    chosen,
    cut_losses,
    drawn_scores,
    masked_losses,
    problem_of,
    selected,
    square,
    stacked,
    subject_of_model,
    trained,
)


@pytest.fixture(scope="module")
def subject():
    return subject_of(stacked())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != MIXED])
def test_a_quarter_of_every_structure_goes_and_masked_is_cut(name):
    subject = subject_of_model(name)
    problem = subject.problem
    calibrated = calibrate(subject, ["gate_taylor"], batch_size=4)
    selection = selected(subject, calibrated, "gate_taylor", 0.25)
    assert selection.actual >= 0.25
    for structure in subject.structures:
        kept = selection.keep[structure.name].sum(1)
        assert len(set(kept.tolist())) == 1
        assert kept[0] >= 0.5 * structure.units or structure.units < 5
    masked, dense = (masked_losses(subject, keep) for keep in (selection.keep, None))
    function, params = cut(subject, selection.keep)
    removed = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    removed -= sum(leaf.size for leaf in jax.tree.leaves(params))
    assert removed == selection.removed
    np.testing.assert_allclose(cut_losses(subject, selection.keep, params, 4), masked, rtol=1e-4)
    inputs, targets = problem.held_out
    outputs = jax.jit(function)(params, *problem.inputs(inputs))
    np.testing.assert_allclose(jnp.square(outputs - targets).mean(), masked.mean(), rtol=1e-4)
    assert np.abs(masked - dense).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_the_budget_counts_what_two_structures_hold_once(subject, allocation, ratio):
    """Both structures of the model meet in the matrices of its layers."""
    scores = drawn_scores(subject)
    assert subject.prunable == sum(leaf.size for leaf in jax.tree.leaves(subject.problem.params))
    selection = chosen(subject, scores, ratio, allocation)
    _, params = cut(subject, selection.keep)
    left = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert selection.removed == subject.prunable - left == subject.removed(selection.keep)
    assert selection.actual >= ratio
    widened = []
    for name, kept in selection.keep.items():  # one unit more of any structure misses the budget, for `uniform`
        more = kept.copy()
        for row in more:
            row[np.flatnonzero(~row)[:1]] = True
        if (more != kept).any():
            widened.append(subject.removed(selection.keep | {name: more}) < ratio * subject.prunable)
    assert any(widened) or ratio == 0


def test_limits_of_single_structures(subject):
    limits = {"multiple_of": {"layers/down[1]": 2}, "min_keep": {"in[1]": 3}}
    keep = chosen(subject, drawn_scores(subject), 0.4, "global", **limits).keep
    assert keep["layers/down[1]"].sum(1).tolist() in ([2, 2], [4, 4])
    assert keep["in[1]"].sum() >= 3
    assert chosen(subject, drawn_scores(subject), 0.3, max_ratio={"in[1]": 0.0}).keep["in[1]"].all()


def test_candidates_compile_once(subject):
    for seed in range(3):
        keep = chosen(subject, drawn_scores(subject, seed), 0.1 * seed).keep
        list(subject.losses(subject.problem.held_out, [keep], batch_size=2))
    assert subject.programs["losses"]._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "moe", "cross_attention", "linen_encoder", "nnx_decoder"])
def test_gate_taylor_removes_less_than_chance(name):
    """A quarter of the prunable parameters goes, the same share of every structure, judged on held-out examples.

    Of as many that the dense model is surely better: from 64 of them the encoder learns more than holds of others.
    """
    problem = trained(name, count=256)
    subject = subject_of(problem, refused=True)
    chance = [f"random(seed={seed})" for seed in range(8)]
    calibrated = calibrate(subject, ["gate_taylor", *chance], batch_size=64)
    keeps = [subject.existing, *(selected(subject, calibrated, each, 0.25).keep for each in calibrated.estimators)]
    (group,) = subject.losses(problem.held_out, keeps, batch_size=64, at_once=len(keeps))
    dense, *rest = (group[number].mean for number in range(len(keeps)))
    found = dict(zip(calibrated.estimators, rest, strict=True))
    assert dense < found["gate_taylor"] < np.mean([found[each] for each in chance])


@pytest.mark.slow
def test_half_precision():
    problem = stacked()
    half = dataclasses.replace(
        problem,
        function=lambda p, x: problem.function(p, x.astype(jnp.bfloat16)).astype(jnp.float32),
        params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), problem.params),
    )
    subject = subject_of(half)
    calibrated = calibrate(subject, ["taylor_element_second", "gate_taylor"], batch_size=5)
    exact = calibrate(subject_of(problem), calibrated.estimators, batch_size=5)
    for name in calibrated.estimators:
        for structure, values in calibrated.scores(name).items():
            np.testing.assert_allclose(values, exact.scores(name)[structure], rtol=0.3, atol=0.05)
    keep = selected(subject, calibrated, "gate_taylor", 0.4).keep
    masked = masked_losses(subject, keep).mean()
    _, less = cut(subject, keep)
    assert less["in"].dtype == jnp.bfloat16
    assert abs(cut_losses(subject, keep, less).mean() / masked - 1) <= subject.tolerance


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_mixes_its_examples_is_refused():
    with pytest.raises(ValueError, match="the same whatever else is in its batch"):
        subject_of(problem_of(MIXED))
    problem = stacked()
    centred = dataclasses.replace(problem, function=lambda p, x: problem.function(p, x - x.mean(0, keepdims=True)))
    with pytest.raises(ValueError, match="the same whatever else is in its batch"):
        subject_of(centred)
    x, y = problem.first_set
    alike = dataclasses.replace(centred, calibration=(jnp.concatenate([x[:1], x]), jnp.concatenate([y[:1], y])))
    with pytest.raises(ValueError, match="the same whatever else is in its batch"):
        subject_of(alike)


def checked(**fields):
    """Check fields of a problem as users do, without the type checks of the tests in front."""
    problem = object.__new__(Problem)
    for name, value in fields.items():
        object.__setattr__(problem, name, value)
    problem.__post_init__()


@pytest.mark.slow
def test_wrong_problems_are_refused():
    problem = stacked()
    inputs, targets = problem.calibration
    for change, message in (
        ({"params": {"in": 3.0}}, "expected arrays of numbers, got float; let the function hold it"),
        ({"params": {"in": jax.random.key(0)}}, "expected arrays of numbers, got key"),
        ({"loss": 3}, "Problem.loss: expected a function, got int"),
        ({"calibration": inputs}, "Problem.calibration: expected a pair"),
        (
            {"calibration": (inputs, targets[:3])},
            r"as many examples each along their first axis, got \[\(5, 3\), \(3, 2\)",
        ),
        ({"held_out": (inputs[:, :2], targets)}, "expected examples of the shapes and types of calibration"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(**(vars(problem) | change))
    checked(**vars(problem))
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), problem.params)
    with pytest.raises(ValueError, match="expected concrete arrays, got ShapeDtypeStruct; initialise or load them"):
        subject_of(dataclasses.replace(problem, params=shapes))
    with pytest.raises(ValueError, match=r"expected one number .* for one example, got float32 of shape \(1, 2\)"):
        calibrate(subject_of(dataclasses.replace(problem, loss=lambda a, b: (a - b) ** 2)), ["gate_taylor"])
    with pytest.raises(ValueError, match="cannot be traced: KeyError: 'absent'"):
        subject_of(dataclasses.replace(problem, function=lambda p, x: p["absent"]))
    with pytest.raises(ValueError, match="with the batch as their first axis, got shape"):
        subject_of(dataclasses.replace(problem, function=lambda p, x: problem.function(p, x).sum()))
    examples = (jnp.ones((2, 3)), jnp.ones((2, 4)))
    linear = Problem(
        function=lambda p, x: jnp.einsum("bi,id->bd", x, p),
        params=jnp.ones((3, 4)),
        loss=square,
        calibration=examples,
        held_out=examples,
    )
    with pytest.raises(ValueError, match="expected a structure that can be pruned, found none of 2"):
        subject_of(linear)


def test_wrong_estimators_and_budgets_are_refused(subject):
    for names, message in (
        (
            ["block_influence"],
            "estimator 'block_influence': needs block_change, which is not observed of a traced model",
        ),
        (["gate_taylor/magnitude"], "two around a slash"),
        (["gate_fisher(objective='margin')"], "needs gate_gradient_margin"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(subject, names)
    scores = drawn_scores(subject)
    with pytest.raises(ValueError, match=r"within.min_keep: expected names of structures in\[1\], .* got up"):
        chosen(subject, scores, 0.2, min_keep={"up": 2})
    with pytest.raises(ValueError, match="the largest possible ratio is 0.3700 under"):
        chosen(subject, scores, 0.6, max_ratio={"*": 0.3})
    wrong = dataclasses.replace(subject.problem, params=jax.tree.map(lambda w: w * jnp.nan, subject.problem.params))
    with pytest.raises(ValueError, match="the loss of 5 examples is not finite"):
        calibrate(dataclasses.replace(subject, problem=wrong, programs={}), ["gate_taylor"])
