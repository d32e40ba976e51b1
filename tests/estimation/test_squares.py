"""Squared weight gradients against one gradient an example, in float64; what a pass costs; what is not finite."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig, by_axis
from saap_jax.estimation.activations import WRITTEN_NORMS
from saap_jax.estimation.base import Plan, Statistics
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN
from saap_jax.estimation.observe import observe, observe_step, refuse_not_finite
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT, gradient_sums
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.product import is_matrix
from saap_jax.llama.segments import ones_gates
from saap_jax.planning.count import work_of
from saap_jax.runtime.mesh import layout_of
from saap_jax.structures.discovery import parameters_by_path
from tests.helpers import (
    PLAIN,
    changed,
    dense_model,
    length_mask,
    ragged_model,
    random_model,
    random_tokens,
    spec_of,
)

MEAN, SQUARED = WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT
ONE_PASS = PLAIN - {GATE_HESSIAN}
FEW = frozenset({MEAN, SQUARED, GATE_GRADIENT})
TOKENS, MASK = random_tokens(4, 7), length_mask(7, 5, 2, 0, seq=7)
"""Three examples and a padding row."""
TWO_RUNS = spec_of((2, 4), (0, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "remat", "needs"), [(1, "none", FEW), (2, "full", FEW), (4, "dots", ONE_PASS)])
def test_squares_are_those_of_each_examples_mean_loss(x64, size, remat, needs):
    """F = (1/N) Σ_n (∂_n w)²; the padding row and its microbatch count for nothing."""
    model = random_model(TWO_RUNS, dtype=np.float64)
    batches = [(TOKENS[i : i + size], MASK[i : i + size]) for i in range(0, 4, size)]
    values = observe(model, batches, needs, remat=remat).values

    @jax.jit
    def gradient(tokens, mask):
        return jax.grad(lambda m: jnp.sum(next_token_losses(m, tokens, mask)[0]))(model)

    summed = [gradient(jnp.asarray(TOKENS[n : n + 1]), jnp.asarray(MASK[n : n + 1])) for n in range(3)]
    tokens = (6, 4, 1)
    squares = jax.tree.map(lambda *g: sum((x / t) ** 2 for x, t in zip(g, tokens, strict=True)) / 3, *summed)
    means = jax.tree.map(lambda *g: sum(g) / 11, *summed)
    for statistic, expected in ((SQUARED, squares), (MEAN, means)):
        for path, parameter in parameters_by_path(values[statistic]).items():
            expect = parameters_by_path(expected)[path][...]
            if not is_matrix(parameter):
                assert parameter.shape == ()  # embeddings and vectors belong to no structure
                continue
            np.testing.assert_allclose(parameter[...], expect, rtol=1e-9, atol=1e-14, err_msg=path)
    down = [parameters_by_path(values[statistic])["segments/0/mlp/down"][...] for statistic in (SQUARED, MEAN)]
    assert float(jnp.mean(down[0])) > 1.1 * float(jnp.mean(jnp.square(down[1])))  # no square of the mean


@pytest.mark.slow
def test_the_rest_of_the_pass_does_not_notice(x64):
    model = random_model(TWO_RUNS, dtype=np.float64)
    together = observe(model, [(TOKENS, MASK)], ONE_PASS)
    alone = observe(model, [(TOKENS, MASK)], ONE_PASS - {SQUARED})
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-12)
    for statistic, value in alone.values.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14), together.values[statistic], value
        )


class TestCost:
    model = dense_model(mlp=32)
    batch = (jnp.asarray(TOKENS), jnp.asarray(MASK))

    def lowered(self, needs, model=model):
        state = {need: need.init(model, Plan(4)) for need in needs}
        batch, gates = (*self.batch, jnp.asarray(0, jnp.int32)), ones_gates(model.segments)
        return observe_step.lower(model, state, jnp.zeros(4), batch, gates, remat="none").compile()

    def flops(self, needs) -> float:
        return self.lowered(needs).cost_analysis()["flops"]

    @pytest.mark.slow
    def test_one_backward_pass_serves_all(self):
        alone = self.flops({MEAN, SQUARED})
        large = {SECOND_MOMENT, WRITTEN_NORMS}  # those of one more product each
        assert self.flops(ONE_PASS - large) < 1.25 * alone  # what estimators need
        assert self.flops({MEAN}) > 1.8 * self.flops(set())  # where there is one less

    @pytest.mark.slow
    @pytest.mark.parametrize("needs", [{MEAN}, {SQUARED}, {MEAN, SQUARED}, {GATE_GRADIENT}])
    def test_nothing_is_allocated_that_is_not_needed(self, needs):
        parameters = parameters_by_path(self.model).values()
        each = sum(parameter.size if is_matrix(parameter) else 1 for parameter in parameters)
        numbers = each * len(needs & {MEAN, SQUARED})  # of matrices; one number for each other parameter
        state = {need: need.init(self.model, Plan(4)) for need in needs - {GATE_GRADIENT}}
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 4 * numbers
        assert set(observe(self.model, [(TOKENS, MASK)], frozenset(needs)).values) == needs
        memory = self.lowered(needs).memory_analysis()
        slack = 4 * 4 * (2 * 34 + 8)  # gate gradients of four examples
        assert 4 * numbers <= memory.output_size_in_bytes <= 4 * numbers + slack
        assert (
            memory.alias_size_in_bytes >= 4 * numbers
        )  # added to in place: the state is donated, and keeps its layout

    def test_squares_are_added_to_layer_by_layer(self):
        """No second tree as large as the statistic is held; mean gradients, which have one, are the control."""
        model = random_model(dataclasses.replace(spec_of(*[(2, 256)] * 16), embed=256))
        tree = 4 * sum(math.prod(each.shape) for each in parameters_by_path(model).values() if is_matrix(each))
        squares, means = (self.lowered({need}, model).memory_analysis().temp_size_in_bytes for need in (SQUARED, MEAN))
        assert squares < 0.6 * tree < tree < means


class TestNotFinite:
    @pytest.mark.slow
    def test_overflow_of_squares_names_parameter_and_layer(self):
        """Logits of 1e25 give finite losses and gradients, whose squares are too large for float32."""
        model = changed(dense_model(), "unembedding", lambda w: 1e25 * w)
        observe(model, [(TOKENS, MASK)], frozenset({MEAN}))
        with pytest.raises(ValueError, match=r"squared weight gradient of attention/key layer 0 is not finite; check"):
            observe(model, [(TOKENS, MASK)], frozenset({SQUARED}))

    def test_the_place_is_told(self):
        """Of what is kept of each example, the example; of what lies in a layer, its number in the whole model."""
        model = ragged_model()
        nan = changed(model, "segments/1/mlp/up", lambda w: w.at[0, 3, 1].set(jnp.nan))
        gates = {"mlp": jnp.zeros((3, 4, 6)).at[2, 1, 5].set(jnp.inf)}
        moment = {"mlp": jnp.zeros((4, 6, 6)).at[2, 1, 1].set(jnp.nan)}
        for statistic, value, message in (
            (MEAN, nan, "the weight gradient of mlp/up layer 2 is not finite;"),
            (GATE_GRADIENT, gates, "the gate gradient of mlp example 2 layer 1 unit 5 is not finite;"),
            (SECOND_MOMENT, moment, "the second moment of mlp layer 2 is not finite;"),
        ):
            statistics = Statistics(jnp.asarray(3), jnp.asarray(9), jnp.zeros(3), {statistic: value})
            with pytest.raises(ValueError, match=message):
                refuse_not_finite(statistics, model)
        refuse_not_finite(statistics._replace(values={MEAN: model}), model)

    def test_misplaced_padding(self):
        for mask in (MASK[::-1], MASK[:, ::-1]):
            with pytest.raises(ValueError, match="expected padding tokens on the right and padding rows at the end"):
                observe(ragged_model(), [(TOKENS, mask)], frozenset({MEAN}))


# --- the sums ---------------------------------------------------------------------------------------


def drawn(batch: int, length: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return activations, output gradients that are zero behind a length of its own for each example, and weights."""
    random = np.random.default_rng(batch * length)
    x, dy = (random.standard_normal((batch, length, width)).astype(np.float32) for width in (inputs, outputs))
    lengths = np.maximum(length - 3 * np.arange(batch), 2)
    dy *= (np.arange(length) < lengths[:, None])[..., None]
    return x, dy, (1 / lengths).astype(np.float32)


def by_hand(x: np.ndarray, dy: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    each = [a.T.astype(np.float64) @ b for a, b in zip(x, dy, strict=True)]
    return sum(each), sum((s * g) ** 2 for s, g in zip(scale, each, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 7, 5, 9), (4, 16, 130, 257), (1, 33, 16, 128)])
def test_sums_are_the_definition(shape):
    x, dy, scale = drawn(*shape)
    total, square = by_hand(x, dy, scale)
    found = gradient_sums(*map(jnp.asarray, (x, dy, scale)), embed=0)
    for sums, expected in zip(found, (total, square), strict=True):
        np.testing.assert_allclose(sums, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    if len(x) > 1:
        wrong = by_hand(x, dy, np.full_like(scale, scale.mean()))[1]  # all examples alike
        assert np.abs(wrong - square).max() > 1e-3 * np.abs(square).max()


def test_sums_of_narrow_activations_are_wide():
    x, dy, scale = drawn(3, 32, 24, 40)
    narrow = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    expected = by_hand(*(np.asarray(each.astype(jnp.float32)) for each in narrow), scale)
    total, square = gradient_sums(*narrow, jnp.asarray(scale), embed=0)
    assert square.dtype == jnp.float32
    np.testing.assert_allclose(square, expected[1], rtol=1e-4, atol=1e-4 * expected[1].max())
    np.testing.assert_allclose(total.astype(jnp.float32), expected[0], rtol=0.02, atol=0.02 * expected[0].max())


def test_the_mean_needs_no_product_of_its_own():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 64, 256), (2, 64, 384), (2,))]
    traced = jax.jit(functools.partial(gradient_sums, embed=0)).trace(*shapes)
    assert work_of(traced.jaxpr, frozenset()).flops == 2 * 2 * 64 * 256 * 384


@pytest.mark.sharded
@pytest.mark.parametrize("embed", [0, 1])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 2, 2, 2)])
def test_sums_on_a_mesh_are_those_of_one_device(sizes, embed):
    x, dy, scale = drawn(8, 24, 16, 32)
    expected = by_hand(x, dy, scale)
    mesh = layout_of(MeshConfig(**by_axis(sizes))).mesh
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(gradient_sums, embed=embed))(x, dy, scale)
    for sums, expect in zip(found, expected, strict=True):
        np.testing.assert_allclose(sums, expect, rtol=1e-4, atol=1e-4 * np.abs(expect).max())
