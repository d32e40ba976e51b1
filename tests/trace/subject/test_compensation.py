"""Compensation of traced models: beside plain numpy, what it restores exactly, and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.steps.repair.output import Bias, LeastSquares
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.compensation import DAMPING
from saap_jax.trace.subject.subject import subject_of
from tests.trace.subject.problems import masked_losses, problem_of, repaired, square, subject_of_model, trained

D, F, HEADS, WIDTH, LAYERS, SEQ, COUNT = 6, 9, 3, 4, 2, 5, 24
ROADS = ("dense", "pruned")


def drawn(random, *shape):
    return jnp.asarray(random.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1))


def mlp_problem(dtype=np.float64, rows=COUNT) -> Problem:
    """Make one hidden layer with a bias behind it."""
    random = np.random.default_rng(0)
    params = {"up": drawn(random, 5, F), "down": drawn(random, F, 4), "bias": drawn(random, 4)}
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    examples = [(drawn(random, rows, 5).astype(dtype) * 2, drawn(random, rows, 4).astype(dtype)) for _ in range(2)]

    def function(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"] + p["bias"][None]

    return Problem(function=function, params=params, loss=square, calibration=examples[0], held_out=examples[1])


def attend(h, w, xp=jnp):
    """Compute what heads hand to their output projection, `[batch, seq, heads, width]`."""
    q, k, v = (xp.einsum("btd,dhe->bthe", h, w[name]) for name in ("query", "key", "value"))
    scores = xp.einsum("bthe,bshe->bhts", q, k)
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    return xp.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdims=True), v)


def transformer_problem(count=COUNT) -> Problem:
    """Make a transformer with scanned layers, biases behind both projections, and a stream without a norm."""
    random = np.random.default_rng(1)
    layers = {
        **{name: drawn(random, LAYERS, D, HEADS, WIDTH) for name in ("query", "key", "value")},
        "out": drawn(random, LAYERS, HEADS, WIDTH, D), "out_bias": drawn(random, LAYERS, D),
        "up": drawn(random, LAYERS, D, F), "down": drawn(random, LAYERS, F, D), "down_bias": drawn(random, LAYERS, D),
    }  # fmt: skip
    params = {"in": drawn(random, 3, D), "layers": layers, "head": drawn(random, D, 2)}
    examples = [(drawn(random, count, SEQ, 3), drawn(random, count, SEQ, 2)) for _ in range(2)]

    def function(p, x):
        def layer(x, w):
            x = x + jnp.einsum("bthe,hed->btd", attend(x, w), w["out"]) + w["out_bias"][None, None]
            return x + jnp.tanh(x @ w["up"]) @ w["down"] + w["down_bias"][None, None], None

        return jax.lax.scan(layer, x @ p["in"], p["layers"])[0] @ p["head"]

    return Problem(function=function, params=params, loss=square, calibration=examples[0], held_out=examples[1])


@functools.cache
def transformer(x64: bool):
    """Trace it, in the precision that is in force; which one that is, the caller says."""
    assert jax.config.jax_enable_x64 == x64
    return subject_of(transformer_problem())


def keep_for(subject, seed=0, share=0.4, only=None):
    """Remove as many random units of each copy of every structure but streams."""
    random = np.random.default_rng(seed)
    keep = {}
    for each in subject.structures:
        order = random.permuted(np.tile(np.arange(each.units), (each.copies, 1)), axis=1)
        goes = each.role != "stream" and (only is None or each.name in only)
        keep[each.name] = order >= max(round(share * each.units), 1) if goes else np.ones_like(order, bool)
    return keep


def ridge(a, target, weight, kept, damping):
    """Find W' by numpy's least squares on the rows themselves, resisted by √δ of each coordinate's energy."""
    resist = np.diag(np.sqrt(damping * np.square(a[:, kept]).sum(0)))
    rows = np.concatenate([a[:, kept], resist])
    found = np.zeros_like(weight)
    found[kept] = np.linalg.lstsq(rows, np.concatenate([target, resist @ weight[kept]]))[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_one_hidden_layer_is_numpys_least_squares(road, x64):
    problem = mlp_problem()
    subject = subject_of(problem)
    keep = keep_for(subject)
    new, (correction,) = repaired(subject, keep, propagate=road, damping=0.1)
    p = jax.tree.map(np.asarray, problem.params)
    a, kept = np.maximum(np.asarray(problem.calibration[0]) @ p["up"], 0), keep["down[0]"][0]
    matrix = ridge(a, a @ p["down"], p["down"], kept, 0.1)
    np.testing.assert_allclose(new.problem.params["down"], matrix, rtol=1e-7, atol=1e-10)
    for name in ("up", "bias"):
        np.testing.assert_array_equal(new.problem.params[name], p[name])
    plain = np.where(kept[:, None], p["down"], 0)
    assert np.abs(matrix - plain).max() > 1e-2
    lost = np.square(a @ (p["down"] - plain)).sum() / np.square(a @ p["down"]).sum()
    np.testing.assert_allclose(correction.error, lost, rtol=1e-9)
    assert correction[:3] == ("down[0]", 0, 0.1)
    assert correction.corrected < correction.error


def replayed(problem, keep, road, damping):
    """Correct the parameters in a loop of numpy, with what is gone set to zero by hand."""
    p = jax.tree.map(np.array, problem.params)
    layers = p["layers"]
    x = now = np.asarray(problem.calibration[0]) @ p["in"]
    heads, channels = keep["layers/key[2]"], keep["layers/down[1]"]
    width = keep["layers/out[2]"].reshape(HEADS, LAYERS, WIDTH).swapaxes(0, 1)  # copies in the order of `copied`
    for at in range(LAYERS):
        w = {name: value[at].copy() for name, value in layers.items()}

        def part(which, active, matrix, bias, kept):
            """Correct one matrix; return what the dense model writes, and what the corrected one does."""
            (a, dense), kept = (y.reshape(-1, kept.size) for y in active), kept.ravel()
            own = dense if road == "dense" else a * kept
            old = layers[matrix][which].reshape(kept.size, -1).copy()
            new = ridge(own, dense @ old, old, kept, damping)
            layers[matrix][which] = new.reshape(layers[matrix].shape[1:])
            return [(y @ w + layers[bias][which]).reshape(COUNT, SEQ, -1) for y, w in ((dense, old), (a * kept, new))]

        kept = heads[at][:, None] & width[at]
        dense, pruned = part(at, (attend(now, w, np), attend(x, w, np)), "out", "out_bias", kept)
        x, now = x + dense, now + pruned
        dense, pruned = part(at, (np.tanh(now @ w["up"]), np.tanh(x @ w["up"])), "down", "down_bias", channels[at])
        x, now = x + dense, now + pruned
    return p


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_a_scanned_transformer_is_a_loop_in_numpy(road, x64):
    """In the order of the program: the heads of a layer, its channels, the next layer."""
    subject = transformer(x64=True)
    problem = subject.problem
    key = next(each.name for each in subject.structures if each.role == "head width" and "key" in each.name)
    assert next(each.copied for each in subject.structures if each.name == "layers/out[2]") == (HEADS, LAYERS)
    keep = keep_for(subject) | {key: subject.existing[key]}  # what goes there changes the heads' own activations
    new, corrections = repaired(subject, keep, 7, propagate=road, damping=0.1)  # seven do not divide the examples
    assert [each.layer for each in corrections] == [0, 0, 1, 1]
    assert {each.structure for each in corrections} == {"layers/key[2] × layers/out[2]", "layers/down[1]"}
    expected = replayed(problem, keep, road, 0.1)
    other = replayed(problem, keep, next(each for each in ROADS if each != road), 0.1)
    for name, value in new.problem.params["layers"].items():
        np.testing.assert_allclose(value, expected["layers"][name], rtol=1e-6, atol=1e-9, err_msg=name)
    for name in ("out", "down"):
        assert np.abs(expected["layers"][name] - problem.params["layers"][name]).max() > 1e-2
    assert np.abs(expected["layers"]["down"] - other["layers"]["down"]).max() > 1e-3  # the roads differ


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_nothing_pruned_leaves_every_bit_as_it_is(road):
    subject = transformer(x64=False)
    new, corrections = repaired(subject, subject.existing, 4, propagate=road)
    assert not corrections
    for one, other in zip(*(jax.tree.leaves(each.problem.params) for each in (subject, new)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    pruned, _ = repaired(subject, keep_for(subject), 4, propagate=road)
    assert pruned.digests()["parameters"] != subject.digests()["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_units_that_others_can_stand_in_for_are_restored(road, x64):
    """Channels that are sums of others go without a trace, where they were not so without compensation."""
    problem = mlp_problem()
    up = problem.params["up"].at[:, 3].set(problem.params["up"][:, 0] * 2).at[:, 5].set(problem.params["up"][:, 1])
    problem = dataclasses.replace(problem, params=problem.params | {"up": up})
    subject = subject_of(problem)
    keep = {"down[0]": ~np.isin(np.arange(F), (3, 5))[None]}
    new, _ = repaired(subject, keep, propagate=road, damping=1e-10)
    dense, plain = masked_losses(subject, None), masked_losses(subject, keep)
    found = masked_losses(new, keep)
    np.testing.assert_allclose(found, dense, rtol=1e-6)
    assert np.abs(plain - dense).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "linen_encoder"])
def test_the_held_out_loss_falls_and_masked_is_cut(name):
    """Of a trained model a quarter to a third goes; negative control: corrections made on noise do not help as much."""
    problem = trained(name, count=64, steps=200)
    subject = subject_of(problem, refused=True)
    keep = keep_for(subject, share=0.3, only=subject.existing.keys() - subject.unrepaired(LeastSquares()).keys())
    plain, dense = masked_losses(subject, keep).mean(), masked_losses(subject, None).mean()
    for road in ROADS:
        new, corrections = repaired(subject, keep, 4, propagate=road)
        found = masked_losses(new, keep).mean()
        assert dense < found < 0.8 * plain, (dense, found, plain)
        assert all(each.corrected < each.error for each in corrections)
        np.testing.assert_allclose(new.cut(keep).losses(problem.held_out, 16).mean, found, rtol=1e-4)
    constant = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), problem.calibration)
    wrong, _ = repaired(subject, keep, 4, constant, propagate="dense", damping=0.01)
    assert masked_losses(wrong, keep).mean() > found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnet", "phi", "nnx_decoder", "cross_attention", "moe", "nnx_cnn"])
def test_what_each_corrected_matrix_writes_nears_the_dense_output(name):
    """On every model; convolutions by their windows, channels of experts by all experts together.

    Of each structure by itself; with all of them, what is masked is what is cut.
    """
    subject = subject_of_model(name)
    restored = []
    for each in subject.structures:
        keep = keep_for(subject, only={each.name})
        if each.name in subject.unrepaired(LeastSquares()) or keep[each.name].all():
            continue
        _, corrections = repaired(subject, keep, 4, propagate="dense")
        assert corrections, each.name
        assert all(c.corrected <= c.error * (1 + 1e-6) for c in corrections)
        before, after = (np.mean([getattr(each, name) for each in corrections]) for name in ("error", "corrected"))
        assert after < 0.99 * before or before < 1e-6, each.name  # dead channels leave only rounding to correct
        restored.append(after < 0.98 * before)
    assert any(restored)
    keep = keep_for(subject, only=subject.existing.keys() - subject.unrepaired(LeastSquares()).keys())
    new, corrections = repaired(subject, keep, 4, propagate="dense")
    assert corrections
    plain, masked = masked_losses(subject, keep), masked_losses(new, keep)
    np.testing.assert_allclose(new.cut(keep).losses(subject.problem.held_out, 8).means, masked, rtol=1e-3, atol=1e-6)
    assert np.abs(masked - plain).max() > 1e-5, "control"


@pytest.mark.slow
def test_every_fourth_batch_is_held_out_and_judges(x64):
    problem = mlp_problem()
    subject = subject_of(problem)
    keep = keep_for(subject)
    new, (correction,) = repaired(subject, keep, 2)
    p, kept = jax.tree.map(np.asarray, problem.params), keep["down[0]"][0]
    a = np.maximum(np.asarray(problem.calibration[0]) @ p["up"], 0)
    held, target = np.arange(COUNT) // 2 % 4 == 3, a @ p["down"]
    made = ridge(a[~held], target[~held], p["down"], kept, DAMPING)
    error = np.square((target - a @ made)[held]).sum() / np.square(target[held]).sum()
    assert correction.damping == DAMPING
    np.testing.assert_allclose(correction.corrected, error, rtol=1e-6)
    expected = ridge(a, target, p["down"], kept, DAMPING)
    np.testing.assert_allclose(new.problem.params["down"], expected, rtol=1e-6, atol=1e-9)
    other, _ = repaired(subject, keep, 2, damping=0.01)
    assert np.abs(other.problem.params["down"] - expected).max() > 1e-3, "control"


@pytest.mark.slow
def test_types_and_kinds_of_arrays_stay():
    problem = mlp_problem(np.float32)
    params = {name: value.astype(jnp.bfloat16) for name, value in problem.params.items()}
    params["down"] = np.asarray(params["down"])
    run = lambda p, x: problem.function(p, x.astype(jnp.bfloat16)).astype(jnp.float32)  # noqa: E731
    subject = subject_of(dataclasses.replace(problem, function=run, params=params))
    new, _ = repaired(subject, keep_for(subject), 4)
    for name, value in new.problem.params.items():
        assert (type(value), value.dtype) == (type(params[name]), jnp.bfloat16)


# --- left alone ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_cannot_be_corrected_is_left_alone_with_a_reason():
    """Experts and what meets one matrix with them; streams; widths that meet no parameter."""
    subject = subject_of(problem_of("moe", 16))
    both = keep_for(subject, share=0.3)
    assert not both["down[0]"].all()
    new, corrections = repaired(subject, both, 4)
    assert not corrections
    assert new.digests() == subject.digests()
    assert subject.unrepaired(LeastSquares(), both) == {
        "down[0]": "its units are experts, whose rows go to others",
        "down[1]": "down also loses units of down[0]",
    }
    channels = keep_for(subject, only={"down[1]"})
    assert [each.structure for each in repaired(subject, channels, 4)[1]] == ["down[1]"]
    assert subject.unrepaired(LeastSquares(), channels) == {}
    subject = subject_of(problem_of("nnx_decoder", 8), norms=True, refused=True)
    left = subject.unrepaired(LeastSquares())
    assert left.keys() == {"attention/key/kernel[0]", "attention/key/bias[1]"}
    assert left["attention/key/kernel[0]"] == "it is a stream that several parts read, or that a norm averages over"
    assert left["attention/key/bias[1]"].startswith("its units meet no parameter as it is at dot_general[")
    keep = {name: units.copy() for name, units in subject.existing.items()}
    for name in left:
        keep[name][:, 0] = False
    assert not repaired(subject, keep, 2)[1]


def test_biases_and_second_repairs_are_refused():
    problem = mlp_problem(np.float32)
    subject = subject_of(problem)
    with pytest.raises(ValueError, match="bias: expected no repair, or least_squares, for a traced model"):
        subject.check_repair(Bias(), 8)
    with pytest.raises(
        ValueError, match="least_squares.noise: is beside the tokens of a text, which a traced model do"
    ):
        subject.check_repair(LeastSquares(noise=2.0), 8)
    subject.check_repair(LeastSquares(damping=0.1), 8)  # control
    new, _ = repaired(subject, keep_for(subject), 2)
    with pytest.raises(ValueError, match="expected one repair of a traced model, got a second one behind it"):
        new.repaired(keep_for(subject), problem.calibration, LeastSquares(), dense=subject)
