"""Arrays on a mesh with explicit axes, and calls where one is in force: scores, units and losses of one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import saap_jax
from saap_jax.data import Windows, pairs
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import LayerWidths, LlamaSpec, random_llama
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import automatic
from saap_jax.trace.adapters import from_nnx
from saap_jax.trace.subject.subject import subject_of

pytestmark = pytest.mark.sharded
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def put(value, mesh, *spec):
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


def in_force(mesh, yes: bool):
    return jax.set_mesh(mesh) if yes else contextlib.nullcontext()


# --- the door


def test_places_are_kept_and_nothing_is_copied(mesh):
    array = put(np.arange(32.0, dtype=np.float32).reshape(4, 8), mesh, "data", "model")
    tree = {"a": array, "b": np.ones(2), "c": 3}
    made = automatic(tree)
    assert set(made["a"].sharding.mesh.axis_types) == {AxisType.Auto}
    assert made["a"].sharding.spec == array.sharding.spec
    where = [[part.data.unsafe_buffer_pointer() for part in each.addressable_shards] for each in (array, made["a"])]
    assert where[0] == where[1]
    np.testing.assert_array_equal(made["a"], array)
    assert automatic(made) is made
    shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    assert automatic(shape).sharding is None


# --- our LLaMA


@pytest.fixture(scope="module")
def model():
    widths = LayerWidths(kv_heads=4, q_per_kv=1, mlp=16)
    return random_llama(LlamaSpec(vocab=32, embed=16, head_dim=4, layers=(widths,) * 2, tied=True), jax.random.key(0))


@pytest.fixture(scope="module")
def windows():
    return Windows(np.random.default_rng(0).integers(0, 32, (16, 8)).astype(np.int32), np.ones((16, 8), bool))


def spread(model, mesh):
    def place(leaf):
        last = "model" if leaf.shape[-1] % 4 == 0 else None
        return put(leaf, mesh, *[None] * (leaf.ndim - 1), last)

    return jax.tree.map(place, model)


def through_the_api(model, windows):
    """Find scores, units, perplexities (dense, masked, cut, compensated), and the compensated model."""
    scored = saap_jax.score_units(model, windows, ["gate_fisher"])
    keep = saap_jax.select_units(model, scored, 0.3).keep
    cut = saap_jax.cut(model, keep)
    method = "gate_fisher > uniform > least_squares(damping=0.1)"
    corrected = saap_jax.run_chain(model, method, windows, 0.3).subject.model
    losses = [saap_jax.perplexity(model, windows, kept) for kept in (None, keep)]
    return scored, keep, losses + [saap_jax.perplexity(each, windows) for each in (cut, corrected)], corrected


@pytest.fixture(scope="module")
def alone(model, windows):
    return through_the_api(model, windows)


@pytest.mark.parametrize(("arrays", "inside"), [(True, False), (False, True), (True, True)])
def test_a_model_on_explicit_axes_is_that_of_one_device(arrays, inside, model, windows, mesh, alone, tmp_path):
    given = spread(model, mesh) if arrays else model
    with in_force(mesh, inside):
        scored, keep, losses, corrected = through_the_api(given, windows)
        saap_jax.save_model(corrected, tmp_path / "m")
        loaded = saap_jax.load_model(tmp_path / "m")
        again = saap_jax.perplexity(loaded, windows)
        assert jax.sharding.get_abstract_mesh().empty != inside
    for structure, values in alone[0].scores("gate_fisher").items():
        np.testing.assert_allclose(scored.scores("gate_fisher")[structure], values, rtol=1e-4, atol=1e-6 * values.max())
    assert all(np.array_equal(keep[name], kept) and not kept.all() for name, kept in alone[1].items())
    np.testing.assert_allclose(losses, alone[2], rtol=1e-4)
    assert len({round(each, 2) for each in losses}) > 2, "control"
    assert again == pytest.approx(losses[-1], rel=1e-4)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(corrected)} == ({8} if arrays else {1})
    for expected, got in zip(jax.tree.leaves(alone[3]), jax.tree.leaves(corrected), strict=True):
        np.testing.assert_allclose(fetched(got), expected, rtol=0, atol=2e-3)


def test_what_is_behind_the_door_takes_no_explicit_axes(model, windows, mesh):
    with pytest.raises(ValueError, match=r"UNCONSTRAINED|Explicit"):
        window_losses(spread(model, mesh), pairs(windows, 8))


# --- models of others

RANDOM = np.random.default_rng(0)
PARAMS = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in (("up", (16, 24)), ("down", (24, 4)))}
X = RANDOM.normal(size=(16, 16)).astype(np.float32)
Y = np.sin(X[:, :4])
FOURS = "gate_taylor > within(multiple_of={'down[0]': 4}) > uniform"


def mean_square(outputs, targets):
    return jnp.square(outputs - targets).mean()


def plain(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def problem(function, params=PARAMS, x=X, y=Y):
    return saap_jax.Problem(function=function, params=params, loss=mean_square, calibration=(x, y), held_out=(x, y))


def placed(mesh):
    params = {"up": put(PARAMS["up"], mesh, None, "model"), "down": put(PARAMS["down"], mesh, "model", None)}
    return params, put(X, mesh, "data"), put(Y, mesh, "data")


@pytest.fixture(scope="module")
def pruned():
    return saap_jax.prune(problem(plain), ratio=0.3, method=FOURS)


@pytest.mark.parametrize(("arrays", "inside"), [(True, False), (False, True), (True, True)])
def test_a_traced_model_is_pruned_as_on_one_device(arrays, inside, mesh, pruned):
    params, x, y = placed(mesh) if arrays else (PARAMS, X, Y)
    with in_force(mesh, inside):
        made = saap_jax.prune(problem(plain, params, x, y), ratio=0.3, method=FOURS)
        outputs = [each(made.params, x) for each in (made.function, jax.jit(made.function))]
    (name,) = pruned.keep
    np.testing.assert_array_equal(made.keep[name], pruned.keep[name])
    for what, loss in pruned.losses.items():
        assert made.losses[what] == pytest.approx(loss, rel=1e-4)
    assert pruned.losses["cut"] > 1.01 * pruned.losses["dense"], "control"
    expected = pruned.function(pruned.params, X)
    for got in outputs:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    if arrays:
        assert {name: leaf.sharding.spec for name, leaf in made.params.items()} == {
            name: leaf.sharding.spec for name, leaf in params.items()
        }
        assert {leaf.sharding.mesh for leaf in made.params.values()} == {mesh}


class Perceptron(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 4, rngs=rngs)
        self.dropout, self.norm = nnx.Dropout(0.1, rngs=rngs), nnx.BatchNorm(24, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


def test_a_module_that_was_made_on_the_mesh(mesh):
    with jax.set_mesh(mesh):
        module = Perceptron(nnx.Rngs(0))
        module.up.kernel.set_value(put(np.asarray(module.up.kernel[...]), mesh, None, "model"))
        _, x, y = placed(mesh)
        given = {"loss": mean_square, "calibration": (x, y), "held_out": (x, y)}
        method = "gate_taylor > within(multiple_of={'down/kernel[0]': 4}) > uniform"
        made = saap_jax.prune(module, ratio=0.3, method=method, **given)
        made.model.eval()  # it came as it was given, in training, whose statistics Flax cannot write on these axes
        np.testing.assert_allclose(made.model(x), made.function(made.params, x), rtol=1e-4, atol=1e-5)
        assert subject_of(from_nnx(module, **given)).prunable
    graph, state = nnx.split(module)
    here = nnx.merge(graph, jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), state))
    other = saap_jax.prune(here, loss=mean_square, calibration=(X, Y), held_out=(X, Y), ratio=0.3, method=method)
    assert made.losses == pytest.approx(other.losses, rel=1e-4)
    assert all(np.array_equal(made.keep[name], kept) for name, kept in other.keep.items())


def test_a_function_that_names_a_mesh_itself_is_refused_in_one_line(mesh):
    def named(params, x):
        return plain(params, jax.sharding.reshard(x, NamedSharding(mesh, P("data", None))))

    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"Problem.function: cannot be traced: ValueError: .*data"):
        subject_of(problem(named, *placed(mesh)))
