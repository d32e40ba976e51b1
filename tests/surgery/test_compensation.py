"""Compensation: the formulas against plain algebra, the pass against loops, and what it can restore exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.passes import run_layers
from saap_jax.llama.segments import existing_units, masks
from saap_jax.llama.spec import Constants
from saap_jax.steps.repair.output import Bias, LeastSquares
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.corrections import (
    Normal,
    Sums,
    kept_rows,
    least_squares,
    output_bias,
    output_error,
    rows_of,
)
from saap_jax.types import STRUCTURES
from tests.helpers import RELATIVES, changed, dense_model, forward, random_keep, random_model, random_tokens, spec_of

LEAST = LeastSquares(damping=1e-6, blend=1.0)
BIAS = Bias()
TOKENS = jnp.asarray(random_tokens(2, 6, seed=9))


def batches_of(count: int = 4, batch: int = 2, seq: int = 8, seed: int = 1):
    tokens = random_tokens(count * batch, seq, seed)
    mask = np.ones(tokens.shape, bool)
    mask[-1, seq // 2 :] = False
    return [(tokens[i : i + batch], mask[i : i + batch]) for i in range(0, len(tokens), batch)]


def problem(seed: int = 0, count: int = 50, coordinates: int = 7, embed: int = 3):
    random = np.random.default_rng(seed)
    a, target = random.standard_normal((count, coordinates)), random.standard_normal((count, embed))
    weights, w = random.uniform(0.1, 2, count), random.standard_normal((coordinates, embed))
    kept = np.array([True, False, True, True, False, True, True])
    return a, target, weights, w, kept, sums_of(a, target, weights)


def sums_of(a, target, weights) -> Normal:
    sums = (
        a.T @ (weights[:, None] * a),
        a.T @ (weights[:, None] * target),
        weights @ a,
        weights @ target,
        (weights[:, None] * target**2).sum(),
        weights.sum(),
        float(len(weights)),
    )
    return Normal(*map(jnp.asarray, sums))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_least_squares_is_ridge_regression_towards_the_old_weights(damping, x64):
    a, target, weights, w, kept, normal = problem()
    found = np.asarray(least_squares(normal, jnp.asarray(w), jnp.asarray(kept), jnp.asarray(damping)))
    root = np.sqrt(weights)[:, None]
    resist = np.diag(np.sqrt(damping * np.square(root * a[:, kept]).sum(axis=0)))
    rows, right = np.concatenate([root * a[:, kept], resist]), np.concatenate([root * target, resist @ w[kept]])
    np.testing.assert_allclose(found[kept], np.linalg.lstsq(rows, right)[0], rtol=1e-9, atol=1e-11)
    assert not found[~kept].any()


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 9, 40, 41])
def test_kept_rows_alone_are_solved_as_all_with_the_others_masked(count, x64):
    random = np.random.default_rng(count)
    normals = [problem(seed=seed, coordinates=41, count=90)[-1] for seed in (1, 2)]
    weight, kept = jnp.asarray(random.standard_normal((41, 3))), np.zeros(41, bool)
    kept[random.permutation(41)[:count]] = True
    both = jax.tree.map(jnp.add, *normals)
    rows, real = kept_rows(kept)
    assert sorted(rows[real]) == list(np.flatnonzero(kept))
    assert len(rows) <= min(count + 5, 41)
    some = Sums(*(rows_of(each, rows) for each in (*normals, both)))
    solved = LeastSquares(damping=0.3).solve(some, weight[rows], jnp.asarray(real))
    fitted = least_squares(normals[0], weight, jnp.asarray(kept), jnp.asarray(0.3))
    assert solved.error == pytest.approx(float(output_error(normals[1], fitted, jnp.zeros(3))), rel=1e-9)
    whole = least_squares(both, weight, jnp.asarray(kept), jnp.asarray(0.3))
    np.testing.assert_allclose(solved.weight, whole[rows], rtol=1e-9, atol=1e-12)


def test_what_pads_kept_rows_does_not_count_as_kept(x64):
    """Rows that go would do more than any correction of the others, if they stayed."""
    random = np.random.default_rng(0)
    a, w, kept = random.standard_normal((200, 41)), random.standard_normal((41, 3)), np.arange(41) < 9
    rows, real = kept_rows(kept)
    assert len(rows) > real.sum()
    some = rows_of(sums_of(a, a @ w, np.ones(200)), rows)
    solved = LeastSquares().solve(Sums(some, some, some), jnp.asarray(w[rows]), jnp.asarray(real))
    assert solved.damping == pytest.approx(8 * 9 / 200), "as many as are kept, without what pads them"
    with_padding = output_error(some, jnp.asarray(w[rows]), jnp.zeros(3))
    assert with_padding < solved.error < output_error(some, jnp.asarray(w[rows] * real[:, None]), jnp.zeros(3)), (
        "control"
    )


def test_the_error_is_that_of_the_tokens(x64):
    a, target, weights, w, _, normal = problem()
    bias = np.array([0.3, -1.0, 2.0])
    expected = (weights[:, None] * (target - a @ w - bias) ** 2).sum() / (weights[:, None] * target**2).sum()
    np.testing.assert_allclose(output_error(normal, jnp.asarray(w), jnp.asarray(bias)), expected, rtol=1e-12)


def test_the_bias_is_the_weighted_mean_of_what_is_missing(x64):
    a, target, weights, w, kept, normal = problem()
    missing = target - a[:, kept] @ w[kept]
    expected = weights @ missing / weights.sum()
    np.testing.assert_allclose(output_bias(normal, jnp.asarray(w), jnp.asarray(kept)), expected, rtol=1e-10)


def observed(model, tokens, mask):
    """Return {structure: activations [layers, tokens, coordinates]}, and the weight of each token in the sums."""
    points = {}

    def observe(point, x):
        return x

    _, seen = jax.jit(lambda m, t: m.hidden(t, None, observe=observe))(model, jnp.asarray(tokens))
    for structure in STRUCTURES:
        active, behind = (
            np.concatenate([np.asarray(segment[p]) for segment in seen]) for p in (structure, f"{structure}_out")
        )
        importance = mask / (np.square(behind).mean(-1) + model.constants.norm_eps)
        points[structure] = active.reshape(len(active), -1, active[0, 0, 0].size), importance.reshape(len(active), -1)
    return points


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["scaled", "equal"])
@pytest.mark.parametrize("method", ["least_squares", "bias"])
def test_dense_propagation_is_the_formula_of_each_sub_block(method, tokens, x64):
    model = dense_model(layers=2, mlp=6, dtype=np.float64)
    keep = random_keep(existing_units(model.segments), 0.5, seed=2)
    keep["attention"][:] = [[True, False], [True, True]]
    batches = batches_of()
    options = {"propagate": "dense", "tokens": tokens}
    repair = LeastSquares(damping=0.1, blend=1.0, **options) if method == "least_squares" else Bias(**options)
    new = compensate(model, keep, batches, repair).model
    text, mask = (np.concatenate(part) for part in zip(*batches, strict=True))
    for structure, (a, weights) in observed(model, text, mask).items():
        if tokens == "equal":
            weights = (weights > 0).astype(float)
        part, name = {"attention": ("attention", "output"), "mlp": ("mlp", "down")}[structure]
        for layer in range(2):
            old, found = (
                np.asarray(getattr(getattr(m.segments[0], part), name)[...][layer]).reshape(a.shape[-1], -1)
                for m in (model, new)
            )
            kept = np.repeat(keep[structure][layer], a.shape[-1] // keep[structure].shape[1])
            gram = a[layer].T @ (weights[layer][:, None] * a[layer])
            across, among = gram[np.ix_(kept, ~kept)], gram[np.ix_(kept, kept)]
            expected = old[kept]
            if method == "least_squares":
                expected = expected + np.linalg.solve(among + 0.1 * np.diag(np.diag(among)), across @ old[~kept])
            else:
                bias = getattr(getattr(new.segments[0], part), f"{name}_bias")[...][layer]
                mean = weights[layer] @ a[layer] / weights[layer].sum()
                np.testing.assert_allclose(bias, mean[~kept] @ old[~kept], rtol=1e-7, atol=1e-12)
            np.testing.assert_allclose(found[kept], expected, rtol=1e-6, atol=1e-10)
            assert not found[~kept].any()


def twins():
    """Return a model whose last half of channels and second KV head compute what the first compute, and the first."""
    model = dense_model(layers=3, mlp=6, dtype=np.float64)
    for name in ("gate", "up"):
        model = changed(model, f"segments/0/mlp/{name}", lambda x: x.at[..., 3:].set(x[..., :3]))
    for name in ("query", "key", "value"):
        model = changed(model, f"segments/0/attention/{name}", lambda x: x.at[:, :, 1].set(x[:, :, 0]))
    keep = {"attention": np.array([[True, False]] * 3), "mlp": np.array([[True] * 3 + [False] * 3] * 3)}
    return model, keep


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_what_a_kept_unit_can_stand_in_for_is_restored(propagate, x64):
    model, keep = twins()
    config = dataclasses.replace(LEAST, propagate=propagate, damping=1e-12)
    new = compensate(model, keep, batches_of(8), config)
    whole, masked = forward(model, TOKENS), forward(model, TOKENS, masks(keep))
    assert np.abs(whole - masked).max() > 0.1
    np.testing.assert_allclose(forward(new.model, TOKENS, masks(keep)), whole, rtol=0, atol=1e-6)
    assert all(each.error > 1e-3 > 1e-9 > each.corrected for each in new.corrections)
    biased = compensate(model, keep, batches_of(8), dataclasses.replace(BIAS, propagate=propagate)).model
    assert np.abs(whole - forward(biased, TOKENS, masks(keep))).max() > 0.01  # no constant does that


@pytest.mark.slow
def test_later_layers_make_up_for_earlier_ones():
    model = dense_model(layers=3, mlp=6)
    keep = existing_units(model.segments)
    keep["mlp"][0, :4] = False
    batches = batches_of(16)
    alone = compensate(model, keep, batches, dataclasses.replace(LEAST, propagate="dense"))
    through = compensate(model, keep, batches, LEAST)
    assert [(each.structure, each.layer) for each in alone.corrections] == [("mlp", 0)]
    assert [(each.structure, each.layer) for each in through.corrections] == [
        ("mlp", 0),
        ("attention", 1),
        ("mlp", 1),
        ("attention", 2),
        ("mlp", 2),
    ]
    tokens, mask = (np.concatenate(part) for part in zip(*batches, strict=True))

    def error(new):
        hidden = jax.jit(lambda m, g: m.hidden(jnp.asarray(tokens), g)[0])
        return float(np.square(np.asarray(hidden(model, None) - hidden(new, masks(keep))))[mask].mean())

    assert error(through.model) < error(alone.model) < error(model)


@pytest.mark.parametrize("config", [LEAST, BIAS], ids=lambda config: config.name)
def test_a_whole_model_is_left_as_it_is(config):
    model = dense_model()
    new = compensate(model, existing_units(model.segments), batches_of(), config)
    assert not new.corrections
    np.testing.assert_array_equal(forward(new.model, TOKENS), forward(model, TOKENS))


def test_what_was_changed_in_front_of_all_pruned_units_is_made_up_for(x64):
    """Behind a bias of the last sub-block the mean of the stream is what it is in the unpruned model."""
    model, batches = dense_model(dtype=np.float64), batches_of()
    keep = existing_units(model.segments)
    keep["mlp"][1, :3] = False
    before = changed(model, "segments/0/mlp/down", lambda down: down.at[0].multiply(0.5))
    done = compensate(before, keep, batches, Bias(tokens="equal"), dense=model).model
    tokens, mask = (np.concatenate(part) for part in zip(*batches, strict=True))
    means = [run_layers(each, each.embedded(jnp.asarray(tokens)), 0, 2, gates)[mask].mean(axis=0)
             for each, gates in ((model, None), (done, masks(keep)))]  # fmt: skip
    np.testing.assert_allclose(*means, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(done.segments[0].mlp.down[...][0], before.segments[0].mlp.down[...][0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_bias_that_a_repair_added_counts_once(family, x64):
    """As in rounds: a second repair of the same units finds nothing that lacks."""
    spec = spec_of((2, 6), (2, 6), constants=RELATIVES.get(family, Constants()))
    model, repair = random_model(spec, dtype=np.float64), Bias(propagate="dense" if family == "llama" else "pruned")
    keep = random_keep(existing_units(model.segments), 0.5, seed=1)
    once = compensate(model, keep, batches_of(), repair).model
    twice = compensate(once, keep, batches_of(), repair, dense=model).model
    np.testing.assert_allclose(*(each.segments[0].mlp.down_bias[...] for each in (twice, once)), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_biases_that_a_model_has_are_kept_and_added_to():
    model = dense_model(output_biases=True)
    keep = random_keep(existing_units(model.segments), 0.5, seed=1)
    keep["attention"][0, 0] = keep["mlp"][1, 0] = False
    least, biased = (compensate(model, keep, batches_of(), config).model for config in (LEAST, BIAS))
    old = model.segments[0].mlp.down_bias[...]
    np.testing.assert_array_equal(least.segments[0].mlp.down_bias[...], old)
    assert np.abs(biased.segments[0].mlp.down_bias[...] - old).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("config", [LEAST, BIAS], ids=lambda config: config.name)
def test_the_size_of_the_microbatches_changes_nothing(config, x64):
    model = dense_model(dtype=np.float64)
    keep = random_keep(existing_units(model.segments), 0.5, seed=1)
    keep["mlp"][0, :2] = False
    one, other = (forward(compensate(model, keep, batches_of(8 // n, n), config).model, TOKENS) for n in (1, 4))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
