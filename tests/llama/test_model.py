"""The model: equal to a second implementation in numpy, to itself in loops, and honest about its sizes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saap_jax.llama.attention import rotary
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.segments import existing_units, ones_gates
from saap_jax.llama.spec import Constants, RopeScaling
from saap_jax.surgery.cut import cut
from tests.helpers import (
    HEADS,
    dense_model,
    forward,
    ragged_model,
    random_keep,
    random_model,
    random_tokens,
    reference,
    spec_of,
)

TOKENS = random_tokens(2, 7)


def logits(model, tokens=TOKENS, gates=None) -> np.ndarray:
    return np.asarray(forward(model, jnp.asarray(tokens), gates))


def differ(first, second) -> bool:
    """True where two results are not nearly equal: the negative control of an equality."""
    return bool(np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_numpy(heads, tied):
    model = dense_model(heads, tied=tied)
    expected = np.stack([reference(model, row)[0] for row in TOKENS])
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-5)
    assert differ(logits(model, TOKENS[::-1]), expected)


def test_layers_without_units_equal_numpy():
    model = random_model(spec_of((2, 0), (0, 6), (0, 0), (1, 3)))
    np.testing.assert_allclose(logits(model)[0], reference(model, TOKENS[0])[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rematerialisation_keeps_gradients():
    model, gates = dense_model(), ones_gates(dense_model().segments)
    tokens, mask = jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool)

    def gradient(remat):
        def loss(model, gates):
            return next_token_losses(model, tokens, mask, gates, remat=remat)[0].sum()

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(model, gates)
        return traced.lower().compile()(model, gates), str(traced.jaxpr).count("dot_general")

    plain, products = gradient("none")
    for remat in ("dots", "full"):
        other, more = gradient(remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, other)
        assert more > products  # it does recompute, and "full" more than "dots"
        products = more


def test_bfloat16_norm_and_softmax_are_float32():
    half = dense_model(dtype=jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda m, t: m(t))(half, jnp.asarray(TOKENS)))
    for operation in ("rsqrt", "exp", "cos", "reduce_max", "reduce_sum"):
        assert set(re.findall(rf":(\w+)\[[^\]]*\] = {operation}\b", program)) == {"f32"}, operation
    assert set(re.findall(r":(\w+)\[[^\]]*\] = logistic\b", program)) == {"bf16"}


@pytest.mark.slow
def test_gates_in_a_ragged_models_padding_change_nothing():
    model = ragged_model()
    gates = {name: jnp.asarray(units, jnp.float32) for name, units in existing_units(model.segments).items()}
    np.testing.assert_array_equal(logits(model, gates=gates), logits(model, gates=ones_gates(model.segments)))


def test_gates_an_example_equal_one_by_one():
    model, random = ragged_model(), np.random.default_rng(0)
    shapes = {name: units.shape for name, units in existing_units(model.segments).items()}
    gates = {name: jnp.asarray(random.uniform(0, 2, (2, *shape)), jnp.float32) for name, shape in shapes.items()}
    together = logits(model, gates=gates)
    for n in range(2):
        alone = logits(model, TOKENS[n : n + 1], {name: gate[n] for name, gate in gates.items()})
        np.testing.assert_allclose(together[n], alone[0], rtol=0, atol=1e-5)
    assert differ(together, logits(model, gates=jax.tree.map(lambda g: g[::-1], gates)))


@pytest.mark.parametrize(("structure", "shape"), [("attention", (4, 2, 7)), ("mlp", (2, 5)), ("mlp", (3, 6))])
def test_wrong_gate_shape_is_refused(structure, shape):
    model = dense_model()
    gates = {**ones_gates(model.segments), structure: jnp.ones(shape)}
    with pytest.raises(ValueError, match=f"gates: expected {structure} of shape .*2 layers.* got"):
        model(jnp.asarray(TOKENS), gates)


SPECS = [
    spec_of((2, 6), (2, 6)),
    spec_of((4, 3), q_per_kv=1, tied=True),
    spec_of((2, 6), (0, 6), (0, 0), (2, 6), constants=Constants(norm_eps=1e-6, eos_tokens=(1, 2))),
]


@pytest.mark.parametrize("spec", SPECS)
def test_spec_round_trip(spec):
    assert random_model(spec).spec == spec
    assert abstract_llama(spec).spec == spec
    other = dataclasses.replace(spec, tied=not spec.tied)
    assert abstract_llama(other).spec == other != spec


def test_model_stores_no_size():
    """All that is static in a model are its constants, so its spec is right after a cut."""
    model = dense_model(layers=3)
    keep = random_keep(existing_units(model.segments), 0.5, seed=1)
    pruned = cut(model, keep)
    widths = zip(keep["attention"].sum(1).tolist(), keep["mlp"].sum(1).tolist(), strict=True)
    assert pruned.spec.layers == spec_of(*widths).layers != model.spec.layers
    assert pruned.constants == model.constants
    for module in (pruned, pruned.segments[0], pruned.segments[0].attention, pruned.segments[0].mlp):
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        plain = {n for n, v in own.items() if v is not None and not isinstance(v, nnx.Variable | nnx.Module | nnx.List)}
        assert plain <= {"constants"}


@pytest.mark.parametrize("wrong", [{"vocab": 0}, {"layers": ()}, {"head_dim": 3}])
def test_impossible_spec_is_refused(wrong):
    with pytest.raises(ValueError, match="model spec: .* got"):
        dataclasses.replace(spec_of((2, 6)), **wrong)


def frequencies(scaling: RopeScaling | None, head_dim: int = 64, theta: float = 5e5) -> np.ndarray:
    """Return the angles of position 1."""
    cos, sin = rotary(jnp.arange(2), head_dim, Constants(rope_theta=theta, rope_scaling=scaling))
    np.testing.assert_array_equal(cos[0], 1)
    return np.arctan2(np.asarray(sin[1], np.float64), np.asarray(cos[1], np.float64))


PLAIN = np.asarray([5e5 ** (-2 * i / 64) for i in range(32)])


def test_rope_linear():
    np.testing.assert_allclose(frequencies(None), PLAIN, rtol=1e-5)
    np.testing.assert_allclose(frequencies(RopeScaling(kind="linear", factor=4.0)), PLAIN / 4, rtol=1e-5)


def test_rope_llama3():
    """Llama 3.1: short wavelengths stay, long ones are divided by 8, those between are interpolated."""
    low, high, original, factor = 1.0, 4.0, 8192, 8.0
    expected, bands = [], set()
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            bands.add("short")
            expected.append(frequency)
        elif wavelength > original / low:
            bands.add("long")
            expected.append(frequency / factor)
        else:
            bands.add("between")
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    assert bands == {"short", "long", "between"}
    scaling = RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_positions=original
    )
    np.testing.assert_allclose(frequencies(scaling), expected, rtol=1e-5)
    assert not np.allclose(expected, PLAIN, rtol=1e-2)
