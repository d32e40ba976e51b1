"""Second-order Taylor estimators, and squared weight gradients against one gradient an example, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation import (
    GATE_GRADIENT,
    GATE_HESSIAN,
    GRAM,
    SECOND_MOMENT,
    SQUARED_WEIGHT_GRADIENT,
    WEIGHT_GRADIENT,
    Statistics,
    make_estimator,
    observe,
)
from saap_jax.estimation.activations import WRITTEN_NORMS
from saap_jax.estimation.base import Plan
from saap_jax.estimation.observe import observe_step, refuse_not_finite
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.product import is_matrix
from saap_jax.llama.segments import ones_gates
from saap_jax.structures import parameters_by_path
from tests.helpers import (
    PLAIN,
    changed,
    dense_model,
    layers_of,
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
MATRICES = {
    "mlp": ("mlp/gate", "mlp/up", "mlp/down"),
    "attention": ("attention/query", "attention/key", "attention/value", "attention/output"),
}


def part(layer: dict[str, np.ndarray], name: str, unit: int) -> list[float]:
    """Return a unit's numbers of one matrix."""
    matrix = layer[name]
    return list((matrix[unit] if name.endswith(("down", "output")) else matrix[:, unit]).ravel())


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "max", "last"])
@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("taylor_element_second", lambda w, d, f: abs(w * d - 0.5 * w**2 * f)),
        ("fisher", lambda w, d, f: w**2 * f),
    ],
)
def test_formulas_by_hand(x64, name, weighted, reduction):
    model, gradient, square = (random_model(spec_of((2, 3), (2, 3)), seed=i, dtype=np.float64) for i in (0, 1, 2))
    statistics = Statistics(jnp.asarray(2), jnp.asarray(9), jnp.zeros(2), {MEAN: gradient, SQUARED: square})
    scores = make_estimator(f"{name}(reduction='{reduction}')").score(statistics, model)
    combine = {"sum": sum, "max": max, "last": lambda values: values[-1]}[reduction]
    trees = [layers_of(tree) for tree in (model, gradient, square)]
    for structure, matrices in MATRICES.items():
        for layer, unit in np.ndindex(scores[structure].shape):
            parts = [[part(tree[layer], matrix, unit) for tree in trees] for matrix in matrices]
            by_hand = combine([sum(map(weighted, *matrix)) for matrix in parts])
            np.testing.assert_allclose(scores[structure][layer, unit], by_hand, rtol=1e-12)


def test_without_second_order_it_is_taylor_element(x64):
    model, gradient = (random_model(spec_of((2, 3), (2, 3)), seed=i, dtype=np.float64) for i in (0, 1))
    zeros = jax.tree.map(jnp.zeros_like, gradient)

    def scores(name, square):
        statistics = Statistics(jnp.asarray(2), jnp.asarray(9), jnp.zeros(2), {MEAN: gradient, SQUARED: square})
        return np.asarray(make_estimator(name).score(statistics, model)["mlp"])

    np.testing.assert_allclose(scores("taylor_element_second", zeros), scores("taylor_element", zeros), rtol=1e-12)
    assert not np.allclose(scores("taylor_element_second", gradient), scores("taylor_element", zeros), rtol=1e-3)


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

    def lowered(self, needs):
        state = {need: need.init(self.model, Plan(4)) for need in needs}
        position = jnp.asarray(0, jnp.int32)
        arguments = (self.model, state, jnp.zeros(4), *self.batch, position, ones_gates(self.model.segments))
        return observe_step.lower(*arguments, needs=frozenset(needs), remat="none").compile()

    def flops(self, needs) -> float:
        return self.lowered(needs).cost_analysis()["flops"]

    @pytest.mark.slow
    def test_one_backward_pass_serves_all(self):
        alone = self.flops({MEAN, SQUARED})
        large = {GRAM, SECOND_MOMENT, WRITTEN_NORMS}  # those of one more product each
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

    @pytest.mark.slow
    def test_the_second_call_does_not_compile(self):
        observe(self.model, [(TOKENS, MASK)], ONE_PASS)
        before = observe_step._cache_size()
        observe(self.model, [(TOKENS[::-1], MASK)], ONE_PASS)
        assert observe_step._cache_size() == before
        observe(self.model, [(TOKENS[:, :5], MASK[:, :5])], frozenset({MEAN}))
        assert observe_step._cache_size() == before + 1


class TestNotFinite:
    @pytest.mark.slow
    def test_overflow_of_squares_names_parameter_and_layer(self):
        """Logits of 1e25 give finite losses and gradients, whose squares are too large for float32."""
        model = changed(dense_model(), "unembedding", lambda w: 1e25 * w)
        observe(model, [(TOKENS, MASK)], frozenset({MEAN}))
        with pytest.raises(
            ValueError, match=r"squared weight gradient of attention/key in layer 0 is not finite; check"
        ):
            observe(model, [(TOKENS, MASK)], frozenset({SQUARED}))

    def test_the_place_is_told(self):
        """Of what is kept of each example, the example; of what lies in a layer, its number in the whole model."""
        model = ragged_model()
        nan = changed(model, "segments/1/mlp/up", lambda w: w.at[0, 3, 1].set(jnp.nan))
        gates = {"mlp": jnp.zeros((3, 4, 6)).at[2, 1, 5].set(jnp.inf)}
        zeros = GRAM.init(model, Plan(3))
        gram = zeros._replace(weight=zeros.weight | {"mlp": zeros.weight["mlp"].at[1, 2].set(jnp.nan)})
        for statistic, value, message in (
            (MEAN, nan, "the weight gradient of mlp/up in layer 2 is not finite;"),
            (GATE_GRADIENT, gates, "the gate gradient of mlp unit 5 in layer 1 is not finite on example 2;"),
            (GRAM, gram, "the gram of mlp in layer 2 is not finite;"),
        ):
            statistics = Statistics(jnp.asarray(3), jnp.asarray(9), jnp.zeros(3), {statistic: value})
            with pytest.raises(ValueError, match=message):
                refuse_not_finite(statistics, model, [(TOKENS, MASK)])
        refuse_not_finite(statistics._replace(values={MEAN: model}), model, [(TOKENS, MASK)])

    @pytest.mark.slow
    def test_a_loss_names_where_it_starts(self):
        model, batches = random_model(TWO_RUNS), [(TOKENS[:2], MASK[:2]), (TOKENS[2:], MASK[2:])]
        broken = changed(model, "segments/1/mlp/up", lambda w: w.at[0, 0, 0].set(jnp.nan))
        with pytest.raises(ValueError, match=r"3 examples .* first is example 0, where it starts in mlp of layer 1"):
            observe(broken, batches, frozenset({MEAN}))
        token = TOKENS[2, 0]
        assert token not in TOKENS[:2]
        broken = changed(model, "embedding", lambda w: w.at[token].set(jnp.inf))
        with pytest.raises(ValueError, match=r"1 examples .* is example 2, where it starts in attention_in of layer 0"):
            observe(broken, batches, frozenset({MEAN}))

    def test_misplaced_padding(self):
        for mask in (MASK[::-1], MASK[:, ::-1]):
            with pytest.raises(ValueError, match="expected padding tokens on the right and padding rows at the end"):
                observe(ragged_model(), [(TOKENS, mask)], frozenset({MEAN}))
