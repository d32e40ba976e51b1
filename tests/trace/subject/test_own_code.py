"""What the model's own code makes of smaller parameters decides what is pruned by default; names may be patterns."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.own_code import compared, verdicts
from saap_jax.trace.subject.subject import subject_of
from saap_jax.trace.trace import by_name, trace
from tests.models_for_tracing import attend
from tests.trace.subject.problems import chosen, stacked


def drawn(**shapes):
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def attention(heads, params, x, width=-1):
    q, k, v = (jnp.einsum("btd,dn->btn", x, params[name]) for name in ("query", "key", "value"))
    q, k, v = (part.reshape(*part.shape[:2], heads, width) for part in (q, k, v))
    y = attend(q, k, v)
    return jnp.einsum("btn,nd->btd", y.reshape(*y.shape[:2], -1), params["out"])


WEIGHTS = drawn(query=(5, 16), key=(5, 16), value=(5, 16), out=(16, 3))
X = drawn(x=(2, 6, 5))["x"]


def found(function, params, x=X):
    traced = trace(function, params, x)
    units = {s.name: (s.role, s.units) for s in traced.prunable}
    return {units[name]: each for name, each in verdicts(function, traced, traced.prunable, params, x).items()}


def test_heads_that_the_code_mixes_are_told():
    """Four heads of width 4: without one, 12 columns are four heads of width 3 to the code, which raises nothing."""
    said = found(lambda p, x: attention(4, p, x), WEIGHTS)
    assert said["heads", 4].verdict == "differs"
    assert "of the outputs" in str(said["heads", 4])
    assert said["head width", 4].verdict == "takes"


def test_a_number_in_the_code_is_a_refusal_and_the_shape_of_parameters_is_not():
    assert found(lambda p, x: attention(4, p, x, 4), WEIGHTS)["heads", 4].verdict == "refuses"
    said = found(lambda p, x: attention(p["query"].shape[1] // 4, p, x, 4), WEIGHTS)
    assert said["heads", 4].verdict == "takes"
    assert "TypeError: cannot reshape" in found(lambda p, x: attention(4, p, x, 4), WEIGHTS)["heads", 4].detail


def test_zeros_hide_no_difference():
    """A matrix that begins with zeros makes all outputs equal; the values that are tried are others."""
    weights = WEIGHTS | {"out": jnp.zeros((16, 3))}
    assert found(lambda p, x: attention(4, p, x), weights)["heads", 4].verdict == "differs"


@pytest.mark.parametrize("bias", [0.0, 300.0])
def test_an_example_of_zeros_and_a_large_bias_hide_no_difference(bias):
    """Without a bias all outputs of an example of zeros are 0; what all outputs share says nothing of the rest."""
    weights = WEIGHTS | {"bias": jnp.full(3, bias)}

    def function(heads, p, x):
        return attention(heads or p["query"].shape[1] // 4, p, x, -1 if heads else 4) + p["bias"][None, None]

    said = {heads: found(functools.partial(function, heads), weights, X * float(bias > 0)) for heads in (4, 0)}
    assert said[4]["heads", 4].verdict == "differs"
    assert said[0]["heads", 4].verdict == "takes", "control"


def test_a_coarse_type_hides_no_more_than_its_tolerance():
    own = jnp.asarray([1.0, -1.0, 0.5, 0.25], jnp.bfloat16)
    assert compared(own, own * 1.03).verdict == "takes"
    assert compared(own, own * 1.2).verdict == "differs"
    assert compared(own + 300, own + 302).verdict == "takes", "a rounding of 300 is 2"


def test_a_size_that_is_used_as_a_value_gives_other_outputs():
    def function(params, x):
        h = jnp.einsum("btd,df->btf", x, params["up"])
        return jnp.einsum("btf,fd->btd", h, params["down"]) / h.shape[-1] ** 0.5

    assert found(function, drawn(up=(5, 8), down=(8, 3)))["channels", 8].verdict == "differs"


def of_attention(heads=4):
    problem = stacked()
    y = jnp.zeros((4, 6, 3))
    x = drawn(x=(4, 6, 5))["x"]
    return dataclasses.replace(
        problem,
        function=lambda p, x: attention(heads, p, jnp.tanh(x)),
        params=WEIGHTS,
        calibration=(x, y),
        held_out=(x, y),
    )


@pytest.mark.slow
def test_what_the_code_does_not_take_is_off_unless_asked_for():
    subject = subject_of(of_attention())
    assert "heads" not in {each.role for each in subject.structures}
    assert [each.verdict for each in subject.left_out.values()] == ["differs"]
    assert "heads" in {each.role for each in subject_of(of_attention(), refused=True).structures}
    scores = {name: np.ones(gate.shape) for name, gate in subject.ones.items()}
    (name,) = subject.left_out
    with pytest.raises(ValueError, match=r"is left alone, as the model's own code gives other outputs"):
        chosen(subject, scores, 0.1, max_ratio={name: 0.5})


def test_nothing_left_says_what_to_ask_for():
    problem = of_attention()

    def fixed(params, x):
        assert params["query"].shape == params["value"].shape == (5, 16), "made for 16"
        return problem.function(params, x)

    with pytest.raises(ValueError, match=r"3 that the model's own code does not take .* refused=True .*made for 16"):
        subject_of(dataclasses.replace(problem, function=fixed))


# --- patterns ------------------------------------------------------------------------------------


def layers(params, x):
    for w in params["layers"]:
        x = x + jnp.einsum("bf,fd->bd", jnp.tanh(jnp.einsum("bd,df->bf", x, w["up"])), w["down"])
    return jnp.einsum("bd,dn->bn", x, params["out"])


def of_layers():
    sizes = (6, 6, 6, 4)
    params = {"layers": [drawn(up=(5, n), down=(n, 5)) for n in sizes], "out": drawn(w=(5, 2))["w"]}
    x, y = drawn(x=(4, 5), y=(4, 2)).values()
    return dataclasses.replace(stacked(), function=layers, params=params, calibration=(x, y), held_out=(x, y))


@pytest.mark.slow
def test_patterns_name_several_structures():
    subject = subject_of(of_layers())
    scores = {name: np.random.default_rng(0).uniform(size=gate.shape) for name, gate in subject.ones.items()}
    limits = {"multiple_of": {"layers/*/down[0]": 2}, "max_ratio": {"layers/*": 0.9, "layers/1/down[0]": 0.0}}
    keep = chosen(subject, scores, 0.3, "global", **limits).keep
    assert keep["layers/1/down[0]"].all()
    assert all(kept.sum() % 2 == 0 for kept in keep.values())
    assert any(not kept.all() for kept in keep.values())


def test_a_pattern_that_fits_nothing_is_refused():
    subject = subject_of(of_layers())
    scores = {name: np.ones(gate.shape) for name, gate in subject.ones.items()}
    for option, value in (("min_keep", 1), ("max_ratio", 1.0), ("multiple_of", 1)):
        with pytest.raises(ValueError, match=rf"{option}.*: expected names .* or patterns of them, got layer/\*"):
            chosen(subject, scores, 0.1, **{option: {"layer/*": value}})


def test_a_name_goes_before_a_pattern_and_a_later_pattern_before_an_earlier():
    names = ["a/0/w[1]", "a/1/w[1]", "b/0/w[1]"]
    assert by_name("f", {"a/1/w[1]": 9, "a/*": 1, "*/0/w[1]": 2}, names) == dict(zip(names, (2, 9, 2), strict=True))
    assert list(by_name("f", {"a/?/w[1]": 9}, names)) == names[:2]
    with pytest.raises(ValueError, match="got a/./w1"):  # brackets are themselves
        by_name("f", {"a/?/w1": 9}, names)
