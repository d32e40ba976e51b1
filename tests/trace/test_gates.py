"""Gates put into traced programs: dense = the function, masked = without the units, gradients = those of our gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.segments import segment_bounds, split_gates
from saap_jax.trace.cut import keep_units, smaller
from saap_jax.trace.interpret import gated
from saap_jax.trace.own_code import retrace
from saap_jax.trace.subject.weights import TracedWeights
from saap_jax.trace.trace import Traced, by_path, trace
from tests.helpers import dense_model, ragged_model, random_tokens
from tests.models_for_tracing import EXAMPLES, all_ones, drawn, floats, masked_as_cut


def values_like(shapes, random):
    """Draw random arrays, positive where a model takes roots or logarithms; tokens for integers."""

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(random.integers(0, 30, leaf.shape), leaf.dtype)
        return jnp.asarray(random.uniform(0.1, 1, leaf.shape) * random.choice([-1, 1], leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def example_of(name):
    example, random = EXAMPLES[name](), np.random.default_rng(0)
    params = values_like(example.params, random)
    if name == "nnx_cnn":
        params["batch_norm"]["var"].set_value(params["batch_norm"]["var"][...] ** 2)
    if name == "convnet":
        params = {
            key: value | {"variance": value["variance"] ** 2} if "norm" in key else value
            for key, value in params.items()
        }
    return example, params, values_like(example.inputs, random)


def keep_of(structure, random):
    """Remove as many random units of each copy: a third, at least one, not all."""
    order = random.permuted(np.broadcast_to(np.arange(structure.units), (*structure.copied, structure.units)), axis=-1)
    return order >= max(structure.units // 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_masked_is_cut(name):
    """Of each structure by itself, then of all of them at once."""
    example, params, inputs = example_of(name)
    traced = trace(example.function, params, *inputs)
    run = jax.jit(gated(traced))
    dense = jax.jit(example.function)(params, *inputs)
    np.testing.assert_allclose(run(all_ones(traced.prunable), params, *inputs), dense, rtol=1e-5, atol=1e-5)
    random = np.random.default_rng(1)
    whole = {each.name: np.ones((*each.copied, each.units), bool) for each in traced.prunable}
    for structure in traced.prunable:
        takes = not structure.normalised and not retrace(example.function, traced, structure, params, *inputs)
        keep = whole | {structure.name: keep_of(structure, random)}
        masked = masked_as_cut(traced, keep, params, *inputs, run=run, own=[example.function] * takes)
        assert np.abs(np.asarray(masked - dense)).max() > 1e-4, structure.name
    masked_as_cut(traced, {each.name: keep_of(each, random) for each in traced.prunable}, params, *inputs, run=run)


def of_llama(traced: Traced, model, gates):
    """Hand gates of the library to the structures of a traced LLaMA that they stand for."""
    found = {}
    for index, run in enumerate(split_gates(gates, segment_bounds(model.segments))):
        for structure in traced.prunable:
            paths = {member.path for member in structure.members}
            if f"segments/{index}/attention/key" in paths and len(structure.gates) == 1 and not structure.normalised:
                found[structure.name] = run["attention"]
            if f"segments/{index}/mlp/up" in paths and len(structure.gates) == 1 and not structure.normalised:
                found[structure.name] = run["mlp"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "mqa", "ragged"])
def test_injected_gates_are_those_of_llama(kind):
    model = ragged_model() if kind == "ragged" else dense_model(kind, mlp=7)
    tokens = jnp.asarray(random_tokens(2, 5))
    random = np.random.default_rng(0)
    layers = sum(run.length for run in model.segments)
    heads = max(run.widths.kv_heads for run in model.segments)
    widest = max(run.widths.mlp for run in model.segments)
    gates = {
        "attention": jnp.asarray(random.uniform(0, 1, (layers, heads)), jnp.float32),
        "mlp": jnp.asarray(random.uniform(0, 1, (layers, widest)), jnp.float32),
    }
    traced = trace(lambda model, tokens: model(tokens), model, tokens)
    run = gated(traced)

    def injected(gates):
        return jnp.square(run(of_llama(traced, model, gates), model, tokens)).mean()

    def own(gates):
        return jnp.square(model(tokens, gates)).mean()

    assert len(of_llama(traced, model, gates)) == 2 * len(model.segments) - (kind == "ragged")
    losses, gradients = zip(*(jax.jit(jax.value_and_grad(f))(gates) for f in (injected, own)), strict=True)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name in gates:
        np.testing.assert_allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5)


def test_wrong_gates_are_errors():
    traced = trace(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], {"a": floats(3, 4), "b": floats(4, 2)}, floats(5, 3))
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"expected names of prunable structures \['a\[1\]'\], got b"):
        gated(traced)({"b": jnp.ones(4)}, params, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"gates of a\[1\]: expected shape \(4,\), got \(3,\)"):
        gated(traced)({"a[1]": jnp.ones(3)}, params, jnp.ones((5, 3)))
    for name, kept, message in (
        ("a[1]", np.ones(2, bool), r"keep of a\[1\]: expected shape \(4,\), got \(2,\)"),
        ("a[0]", np.ones(3, bool), "is pinned: it reaches an input"),
        ("b", np.ones(3, bool), "expected names of structures"),
    ):
        with pytest.raises(ValueError, match=message):
            keep_units(traced, {name: kept}, params)
    with pytest.raises(ValueError, match="expected names of structures"):
        smaller(traced, {"b": np.ones(3, bool)})


@pytest.mark.slow
def test_gates_of_one_change_no_gradient():
    """Not where a maximum is attained twice, either."""

    def function(params, x):
        h = jnp.einsum("bi,id->bd", x, params["in"])
        return jnp.einsum("bd,dn->bn", h, params["out"]) + h.max(-1)[:, None]

    params = {"in": jnp.ones((3, 4)) * jnp.arange(4.0)[None], "out": jnp.ones((4, 2))}
    x = jnp.arange(6.0).reshape(2, 3)
    traced = trace(function, params, x)
    ones = all_ones(traced.prunable)
    runs = (lambda p: function(p, x), lambda p: gated(traced)(ones, p, x))
    jax.tree.map(np.testing.assert_allclose, *[jax.grad(lambda p, f=f: f(p).sum())(params) for f in runs])


def square_of_units(params, x):
    """The hidden axis is the square of a structure: both axes of a matrix that it is reshaped like."""
    h = jnp.einsum("bi,id->bd", x, params["in"])
    y = h.reshape(-1, *params["mix"].shape) + params["mix"][None]
    z = jnp.einsum("bij,jk->bik", y, params["mix"])
    return jnp.einsum("bd,d->b", h, params["head"])[:, None] + jnp.einsum("bik,ik->b", z, params["last"])[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("removed", range(3))
def test_an_axis_that_is_the_square_of_a_structure_loses_rows_and_columns(removed):
    """It once lost the columns alone when masked, for the second place of a unit overwrote the first."""
    random = np.random.default_rng(0)
    shapes = {"in": (4, 9), "mix": (3, 3), "head": (9,), "last": (3, 3)}
    params = {name: drawn(*shape, seed=random) for name, shape in shapes.items()}
    x = drawn(5, 4, seed=random)
    traced = trace(square_of_units, params, x)
    (structure,) = traced.prunable
    assert structure.units == 3
    keep = {structure.name: np.arange(3) != removed}
    assert keep_units(traced, keep, params)["head"].shape == (4,)
    masked_as_cut(traced, keep, params, x, own=[square_of_units], atol=1e-5)
    weights = TracedWeights((structure,), by_path(params))
    (head,) = [weights.view(structure, member) for member in structure.members if member.path == "head"]
    rows = [set(range(3 * u, 3 * u + 3)) | {u, u + 3, u + 6} for u in range(3)]  # each weight once
    for unit, row in enumerate(rows):
        np.testing.assert_allclose(np.sort(head[0, unit]), np.sort(params["head"][np.array(sorted(row))]))
