"""The calibration pass: every statistic against its definition, computed another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.activations import ACTIVATION_MOMENTS
from saap_jax.estimation.base import Curvature, Estimator, Statistic, matrices_of, mean_over
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN
from saap_jax.estimation.observe import observe, observe_step, score
from saap_jax.estimation.registry import make_estimator
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.llama.segments import existing_units, join_segments, masks, ones_gates
from saap_jax.structures.discovery import Member, discover, unit_view
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.helpers import (
    changed,
    dense_model,
    length_mask,
    losses_of,
    ragged_model,
    random_keep,
    random_tokens,
    reference_losses,
)

THREE = frozenset({WEIGHT_GRADIENT, GATE_GRADIENT, ACTIVATION_MOMENTS})
TOKENS = random_tokens(5, 8)
LENGTHS = (8, 5, 7, 8, 3)
MASK = length_mask(*LENGTHS, seq=8)


def batched(tokens=TOKENS, mask=MASK, *, rows: int = 6, size: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut examples into microbatches, filled with padding rows; equal rows and sizes share one compiled program."""
    pad = ((0, rows - len(tokens)), (0, 0))
    tokens, mask = np.pad(tokens, pad), np.pad(mask, pad)
    return [(tokens[i : i + size], mask[i : i + size]) for i in range(0, rows, size)]


def assert_trees_close(first, second, rtol=1e-4, atol=1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), first, second)


@pytest.mark.slow
def test_counts_and_losses():
    model = dense_model()
    seen = observe(model, batched(), THREE)
    assert (int(seen.examples), int(seen.tokens)) == (5, sum(LENGTHS) - 5)
    expected = [reference_losses(model, TOKENS[n, :length]).mean() for n, length in enumerate(LENGTHS)]
    np.testing.assert_allclose(seen.losses, expected, rtol=1e-5)


@pytest.mark.slow
def test_weight_gradient_is_that_of_the_mean_over_tokens():
    model = dense_model()
    seen = observe(model, batched(), THREE).of(WEIGHT_GRADIENT)
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    predicted = sum(LENGTHS) - 5
    gradient = jax.jit(jax.grad(lambda m: losses_of(m, tokens, mask).sum() / predicted))(model)
    assert_trees_close(seen.segments, matrices_of(gradient).segments)
    counts = jnp.asarray(LENGTHS, jnp.float32) - 1
    mean_of_means = jax.jit(jax.grad(lambda m: (losses_of(m, tokens, mask) / counts).mean()))(model)
    down = [tree.segments[0].mlp.down[...] for tree in (seen, gradient, mean_of_means)]
    np.testing.assert_allclose(down[0], down[1], rtol=1e-4, atol=1e-6)
    assert not np.allclose(down[0], down[2], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense_model, ragged_model])
def test_gate_gradients_are_those_of_each_example(make):
    model = make()
    together = observe(model, batched(), THREE).of(GATE_GRADIENT)
    gradient = jax.jit(jax.grad(lambda g, m, t, k: losses_of(m, t, k, g).sum()))
    for n, length in enumerate(LENGTHS):
        tokens, mask = jnp.asarray(TOKENS[n : n + 1]), jnp.asarray(MASK[n : n + 1])
        alone = gradient(ones_gates(model.segments), model, tokens, mask)
        assert_trees_close({name: g[n] * (length - 1) for name, g in together.items()}, alone)
    assert not np.allclose(together["mlp"][0], together["mlp"][1], rtol=1e-2)


def weight_products(model, gradient, path: str, axis: int) -> np.ndarray:
    """Return Σ w ∂w over each unit's part of one matrix, [layers, units]."""
    pairs = zip(model.segments, gradient.segments, strict=True)
    member = Member(path, axis)
    return np.asarray(join_segments([jnp.sum(unit_view(w, member) * unit_view(d, member), axis=2) for w, d in pairs]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa"])
def test_gate_gradient_is_the_sum_of_weight_times_gradient(kind, x64):
    """Over down or up, over output or value; not over gate, query or key."""
    model = dense_model(kind, dtype=np.float64)
    seen = observe(model, batched(), THREE)
    share = (np.asarray(LENGTHS) - 1) / (sum(LENGTHS) - 5)
    equal = {"attention": {"attention/output", "attention/value"}, "mlp": {"mlp/down", "mlp/up"}}
    for name, structure in discover(model).items():
        gates = np.einsum("n,nlu->lu", share, seen.of(GATE_GRADIENT)[name])
        for member in structure.members:
            products = weight_products(model, seen.of(WEIGHT_GRADIENT), member.path, member.axis)
            same = np.allclose(products, gates, rtol=1e-5, atol=1e-8)
            assert same == (member.path in equal[name]), member.path


@pytest.mark.slow
def test_a_bfloat16_model_is_summed_in_float32():
    """Many equal microbatches have the mean of one: a bfloat16 sum would stop growing."""
    model = dense_model(dtype=jnp.bfloat16)
    many = observe(model, batched(TOKENS[[0] * 300], MASK[[0] * 300], rows=300, size=1), THREE)
    one = observe(model, batched(TOKENS[:1], MASK[:1], rows=300, size=1), THREE)
    assert {leaf.dtype for leaf in jax.tree.leaves((many.values, many.losses))} == {jnp.dtype(jnp.float32)}
    for statistic in (WEIGHT_GRADIENT, ACTIVATION_MOMENTS):
        assert_trees_close(many.of(statistic), one.of(statistic), rtol=1e-3)
    assert (int(many.examples), int(one.examples)) == (300, 1)


def test_one_compilation_for_all_microbatches_and_passes():
    model, needs = dense_model(mlp=7), frozenset({GATE_GRADIENT})
    before = observe_step._cache_size()
    first = observe(model, batched(), needs)
    assert observe_step._cache_size() == before + 1
    second = observe(jax.tree.map(lambda x: 2 * x, model), batched(TOKENS[::-1], MASK[::-1]), needs)
    assert observe_step._cache_size() == before + 1
    assert not np.allclose(first.losses, second.losses)


def test_loss_that_is_not_finite_names_the_example():
    """Only example 3 contains the token whose embedding is broken."""
    token = 23
    tokens = np.where(token == TOKENS, 0, TOKENS)
    model = changed(dense_model(), "embedding", lambda w: w.at[token].set(jnp.nan))
    observe(model, batched(tokens), THREE)
    tokens[3, 2] = token
    with pytest.raises(ValueError, match="loss of 1 examples is not finite, the first is example 3; .* in embedding"):
        observe(model, batched(tokens), THREE)
    broken = changed(dense_model(), "segments/0/mlp/up", lambda w: w.at[1, 0, 2].set(jnp.nan))
    with pytest.raises(ValueError, match="estimator magnitude: 1 scores of structure mlp .* layer 1, unit 2"):
        score({"magnitude": make_estimator("magnitude")}, observe(broken, batched(), frozenset()), broken)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (lambda scores: {"mlp": scores["mlp"]}, r"mine: expected scores of attention of shape \(2, 2\), got none"),
        (lambda scores: scores | {"mlp": scores["mlp"][..., None]}, r"of mlp of shape \(2, 6\), got \(2, 6, 1\)"),
    ],
)
def test_scores_of_another_shape_are_refused(left, said):
    model, magnitude = dense_model(), make_estimator("magnitude")
    mine = Estimator(frozenset(), lambda statistics, weights: left(magnitude.score(statistics, weights)))
    with pytest.raises(ValueError, match=said):
        score({"mine": mine}, observe(model, batched(), frozenset()), model)


@pytest.mark.parametrize(
    "batches",
    [[], [(TOKENS[:2], np.zeros((2, 8), bool))], [(TOKENS[:2], length_mask(1, 1, seq=8))]],
    ids=["none", "only padding", "one token each"],
)
def test_empty_calibration_is_refused(batches):
    with pytest.raises(ValueError, match="calibration: expected at least one example with two tokens, got none"):
        observe(dense_model(), batches, THREE)


def test_a_statistic_of_your_own_sees_the_gradient_of_all_parameters():
    model = dense_model()
    of_embedding = Statistic(
        name="embedding_gradient",
        init=lambda model, plan: jnp.zeros(model.embedding.shape),
        source="weights",
        contribute=lambda gradient: gradient.embedding[...],
        accumulation=mean_over("tokens"),
        axes=lambda path: (),
    )
    seen = observe(model, batched(), frozenset({of_embedding, WEIGHT_GRADIENT})).of(of_embedding)
    tokens, mask, predicted = jnp.asarray(TOKENS), jnp.asarray(MASK), sum(LENGTHS) - 5
    gradient = jax.jit(jax.grad(lambda m: losses_of(m, tokens, mask).sum() / predicted))(model)
    np.testing.assert_allclose(seen, gradient.embedding[...], rtol=1e-4, atol=1e-6)
    assert np.abs(seen).max() > 0.01


@pytest.mark.slow
def test_a_masked_model_is_observed_as_the_cut_one(x64):
    """What remains of a masked model has the statistics of the model that the cut leaves."""
    model = dense_model(dtype=np.float64)
    keep = random_keep(existing_units(model.segments), 0.6, seed=1)
    pruned = cut(model, keep)
    assert len(pruned.segments) == 2
    needs = frozenset({GATE_GRADIENT, GATE_HESSIAN, WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT})
    curvature = Curvature(probes=1)
    masked = observe(model, batched(), needs, gates=masks(keep), curvature=curvature)
    small = observe(pruned, batched(), needs, curvature=curvature)
    whole = observe(model, batched(), needs, curvature=curvature)
    np.testing.assert_allclose(masked.losses, small.losses, rtol=1e-9)
    assert not np.allclose(whole.losses, small.losses, rtol=1e-3)
    for name in STRUCTURES:
        for layer, kept in enumerate(keep[name]):
            expected = small.of(GATE_GRADIENT)[name][:, layer, : kept.sum()]
            np.testing.assert_allclose(masked.of(GATE_GRADIENT)[name][:, layer, kept], expected, rtol=1e-7, atol=1e-12)
            if name == "attention":
                np.testing.assert_allclose(
                    masked.of(GATE_HESSIAN).exact[name][layer, kept],
                    small.of(GATE_HESSIAN).exact[name][layer, : kept.sum()],
                    rtol=1e-7,
                    atol=1e-12,
                )
    gradient, square = (
        [each.of(needed) for each in (masked, small)] for needed in (WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT)
    )
    for seen in (gradient, square):  # of matrices; the rest of the tree is filled up so that it can be cut
        filled, expected = (
            jax.tree.map(lambda s, w: s if s.ndim else jnp.zeros_like(w), tree, like)
            for tree, like in zip(seen, (model, pruned), strict=True)
        )
        assert_trees_close(cut(filled, keep), expected, rtol=1e-7, atol=1e-12)
