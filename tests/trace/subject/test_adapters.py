"""Flax models and losses of parameters, by their adapters and `saap_jax.prune`; quantised and sharded parameters."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import saap_jax
from saap_jax.trace.adapters import from_linen, from_nnx
from saap_jax.trace.cut import keep_units
from saap_jax.trace.subject.problem import cut
from saap_jax.trace.subject.subject import subject_of
from saap_jax.trace.trace import trace
from tests.models_for_tracing import drawn
from tests.trace.subject.problems import (
    SAAP,
    calibrate,
    chosen,
    cut_losses,
    drawn_scores,
    masked_losses,
    selected,
    square,
    stacked,
)


class Network(nnx.Module):
    """Convolution, batch norm and dropout, whose sizes the module reads from its arrays only where Flax does."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(8, 10, rngs=rngs)
        self.head = nnx.Linear(10, 4, rngs=rngs)
        self.name = "network"

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        hidden = nnx.relu(self.hidden(self.dropout(x)))
        return self.head(hidden), {"hidden": hidden.mean()}


EXAMPLES = [((drawn(5, 6, 6, 3, seed=i)), drawn(5, 4, seed=i + 9)) for i in range(2)]


def of_network(**changes):
    model = Network(nnx.Rngs(0))
    arguments = {"loss": square, "calibration": EXAMPLES[0], "held_out": EXAMPLES[1], "has_aux": True}
    return model, arguments | changes


def test_nnx():
    """Dropout is off, keys are no parameters, statistics go with their channels, and the module stays as it was."""
    model, arguments = of_network()
    problem = from_nnx(model, **arguments)
    assert not model.dropout.deterministic
    assert "dropout" not in str(jax.tree_util.tree_structure(problem.params))
    subject = subject_of(problem, refused=True)
    channels = next(each for each in subject.structures if each.units == 8)
    assert {m.path for m in channels.members} == {
        "conv/bias", "conv/kernel", "norm/bias", "norm/scale", "norm/mean", "norm/var", "hidden/kernel",
    }  # fmt: skip
    model.eval()
    np.testing.assert_allclose(problem.function(problem.params, EXAMPLES[0][0]), model(EXAMPLES[0][0])[0], rtol=1e-5)


def test_prune_returns_a_module_and_its_widths():
    model, arguments = of_network()
    pruned = saap_jax.prune(model, ratio=0.3, refused=True, **arguments)
    problem = from_nnx(model, **arguments)
    assert type(pruned.params) is type(problem.params)
    assert not problem.rebuild(problem.params).dropout.deterministic, "in the mode that it had"
    assert pruned.losses["cut"] == pytest.approx(pruned.losses["masked"], rel=1e-4)
    assert pruned.losses["dense"] != pytest.approx(pruned.losses["cut"], rel=1e-6)
    small = pruned.model
    assert pruned.model is small, "or what is set on it would be lost"
    assert isinstance(small, Network)
    assert small.name == "network"
    widths = {width.before: width.after for width in pruned.widths.values()}
    assert small.hidden.kernel.shape == (widths[8], widths[10])
    assert pruned.shapes["hidden/kernel"] == ((8, 10), (widths[8], widths[10]))
    x = drawn(3, 9, 7, 3)  # images of another size
    outputs = pruned.function(pruned.params, x)
    assert outputs.shape == (3, 4)
    assert "removed: " in repr(pruned)
    assert len(repr(pruned)) < 300


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.out = nnx.RNN(nnx.GRUCell(3, 10, rngs=rngs)), nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x))


def test_a_module_that_draws_and_one_that_is_trained_afterwards():
    """A recurrent layer draws its first carry; what is made of the outcome shares no variable with its parameters."""
    x = drawn(6, 5, 3)
    given = {"loss": square, "calibration": (x, x), "held_out": (x, x), "ratio": 0.2}
    drawing = saap_jax.prune(Recurrent(nnx.Rngs(0)), refused=True, **given)
    assert drawing.losses["cut"] == pytest.approx(drawing.losses["masked"], rel=1e-4)
    layers = nnx.Linear(3, 6, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(6, 3, rngs=nnx.Rngs(1))
    pruned = saap_jax.prune(nnx.Sequential(*layers), **given)
    before = pruned.function(pruned.params, x)
    np.testing.assert_allclose(pruned.model(x), before, rtol=1e-4, atol=1e-5)
    pruned.model.layers[2].kernel[...] *= 0
    np.testing.assert_array_equal(pruned.function(pruned.params, x), before)
    with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got -1"):
        saap_jax.prune(nnx.Sequential(*layers), batch_size=-1, **given)


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(12)(x))
        x = linen.Dropout(0.5, deterministic=not train)(linen.relu(x))
        return linen.Dense(3)(x)


@pytest.mark.slow
def test_linen_and_a_learned_configuration():
    """The widths are what the configuration has to say: a module of that width takes the parameters."""
    module = Encoder()
    variables = module.init(jax.random.key(0), drawn(2, 5), train=False)
    problem = from_linen(
        module, variables, loss=square, calibration=(drawn(6, 5), drawn(6, 3)), held_out=(drawn(6, 5), drawn(6, 3))
    )
    np.testing.assert_allclose(
        problem.function(problem.params, drawn(6, 5)), module.apply(variables, drawn(6, 5), train=False), rtol=1e-6
    )
    pruned = saap_jax.prune(problem, ratio=0.5, refused=True)
    (width,) = pruned.widths.values()
    assert (width.before, width.role) == (12, "channels")

    class Narrow(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True)(linen.Dense(width.after)(x))
            return linen.Dense(3)(linen.relu(x))

    x = drawn(4, 5, seed=3)
    np.testing.assert_allclose(Narrow().apply(pruned.params, x), pruned.function(pruned.params, x), rtol=1e-5)
    with pytest.raises(ValueError, match=r"1 that the model's own code does not take .*ScopeParamShapeError"):
        saap_jax.prune(problem)


def test_what_cannot_be_pruned_is_said():
    with pytest.raises(ValueError, match="expected a Problem or a module of NNX, Equinox or Keras, got Encoder"):
        saap_jax.prune(Encoder(), loss=square)
    params = {"a/b": drawn(3, 5), "a": {"b": drawn(5, 2)}}
    with pytest.raises(ValueError, match="params: expected paths that differ, got a/b twice"):
        trace(lambda params, x: x @ params["a/b"] @ params["a"]["b"], params, drawn(1, 3))
    with pytest.raises(ValueError, match="expected nothing more beside a Problem, got loss"):
        saap_jax.prune(stacked(), loss=square)
    inputs, targets = stacked().held_out
    with pytest.raises(ValueError, match="held_out: expected finite losses, got nan of the model"):
        saap_jax.prune(dataclasses.replace(stacked(), held_out=(inputs, targets * jnp.nan)))


# --- quantised ------------------------------------------------------------------------------------


def quantised():
    """The layers of `stacked` in eight bits, with a scale a column of `up` and a row of `down`."""
    problem = stacked()
    layers = {}
    for name, axis in (("up", 1), ("down", 2)):
        weight = problem.params["layers"][name]
        scale = jnp.abs(weight).max(axis, keepdims=True) / 127
        layers[name] = {"values": jnp.round(weight / scale).astype(jnp.int8), "scale": jnp.squeeze(scale, axis)}

    def function(params, x):
        up, down = params["layers"]["up"], params["layers"]["down"]
        plain = {
            "up": up["values"].astype(jnp.float32) * up["scale"][:, None],
            "down": down["values"].astype(jnp.float32) * down["scale"][:, :, None],
        }
        return problem.function(params | {"layers": plain}, x)

    return dataclasses.replace(problem, function=function, params=problem.params | {"layers": layers})


@pytest.mark.slow
def test_quantised_weights_go_with_their_scales():
    subject = subject_of(quantised())
    hidden = next(each for each in subject.structures if each.units == 5)
    assert {m.path for m in hidden.members} == {
        "layers/up/values", "layers/up/scale", "layers/down/values", "layers/down/scale",
    }  # fmt: skip
    calibrated = calibrate(subject, ["gate_taylor", "ablation", "random"])
    keep = selected(subject, calibrated, "gate_taylor", 0.3).keep
    assert not keep[hidden.name].all()
    _, less = cut(subject, keep)
    assert less["layers"]["up"]["values"].dtype == jnp.int8
    assert (
        less["layers"]["up"]["values"].shape[2] == less["layers"]["up"]["scale"].shape[1] == keep[hidden.name][0].sum()
    )
    masked = masked_losses(subject, keep)
    np.testing.assert_allclose(cut_losses(subject, keep, less), masked, rtol=1e-5)


def test_estimators_of_weights_refuse_integers_by_name():
    subject = subject_of(quantised())
    for name in (
        "magnitude",
        "taylor_element",
        SAAP,
        "gate_taylor+fisher",
    ):
        with pytest.raises(ValueError, match=r"got int8 in layers/\w+/values \(quantised\?\); use one of gate_\*"):
            calibrate(subject, [name])


# --- sharded --------------------------------------------------------------------------------------


def sharded(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    problem = stacked()

    def put(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    layers = problem.params["layers"]
    params = {
        "in": put(problem.params["in"], None, "data"),
        "layers": {"up": put(layers["up"], "data", None, None), "down": put(layers["down"], None, None, "data")},
        "out": put(problem.params["out"], "data"),
    }

    def function(params, x):
        h = jnp.einsum("bi,id->bd", x, params["in"])
        h = jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P(None, "data")))
        return problem.function(params, x) + 0.1 * jnp.einsum("bd,dn->bn", h, params["out"])

    return dataclasses.replace(problem, function=function, params=params), mesh


@pytest.mark.sharded
@pytest.mark.parametrize("kept", [3, 2])
def test_sharded_arrays_stay_sharded(kept):
    """Where the new width divides the devices; where it does not, the axis is held whole, and the rest stays."""
    problem, mesh = sharded(2)
    subject = subject_of(problem)
    keep = chosen(subject, drawn_scores(subject), 0.2).keep
    keep["in[1]"][:] = np.arange(4) < kept
    function, params = cut(subject, keep)
    axis = "data" if kept % 2 == 0 else None
    assert params["in"].sharding == NamedSharding(mesh, P(None, axis))
    assert params["layers"]["up"].sharding == NamedSharding(mesh, P("data", None, None))
    assert params["out"].sharding.spec[0] == axis
    masked = masked_losses(subject, keep)
    np.testing.assert_allclose(cut_losses(subject, keep, params), masked, rtol=1e-4)
    x, y = problem.held_out
    np.testing.assert_allclose(jnp.square(function(params, x) - y).mean(), masked.mean(), rtol=1e-4)


def test_arrays_of_numpy_stay_arrays_of_numpy():
    problem = stacked()
    problem = dataclasses.replace(problem, params=jax.tree.map(np.asarray, problem.params))
    subject = subject_of(problem)
    keep = {"in[1]": np.arange(4)[None] < 3}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(cut(subject, keep)[1]))
    (structure,) = [each for each in subject.structures if each.name == "in[1]"]
    shaped = {"in[1]": keep["in[1]"].reshape(*structure.copied, 4)}
    wide = keep_units(subject.traced, shaped, jax.tree.map(np.float64, problem.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(float)}


class Batch(NamedTuple):
    x: jax.Array
    scale: jax.Array


def test_a_batch_may_be_a_named_tuple():
    """It is one input; a plain tuple is several."""
    params = {"up": drawn(3, 5), "down": drawn(5, 2, seed=1)}
    batch, targets = Batch(drawn(4, 3), drawn(4, 1)), drawn(4, 2)

    def function(params, given):
        return jax.nn.relu(given.x @ params["up"]) @ params["down"] * given.scale

    problem = saap_jax.Problem(
        function=function, params=params, loss=square, calibration=(batch, targets), held_out=(batch, targets)
    )
    assert [each.units for each in subject_of(problem).structures] == [5]
