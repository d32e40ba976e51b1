"""A cut model at other input shapes than the traced ones: masked = cut, generation, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.trace.interpret import gated
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.problem import at_shapes, cut
from saap_jax.trace.subject.saved import load_pruned
from saap_jax.trace.subject.subject import subject_of
from tests.models_for_tracing import attend, layer_norm
from tests.trace.subject.problems import chosen

HEADS, WIDTH, DIM, HIDDEN, VOCABULARY, LONGEST = 4, 6, 8, 12, 11, 16


def decoder(params, tokens):
    """A decoder with flat projections, reshaped by a number of heads that the code holds, and two layers in a scan."""
    x = params["tokens"][tokens] + params["positions"][: tokens.shape[1]][None]

    def layer(x, w):
        h = layer_norm(x, w["scale"], w["bias"])
        q, k, v = (
            jnp.einsum("btd,dn->btn", h, w[name]).reshape(*h.shape[:2], HEADS, WIDTH)
            for name in ("query", "key", "value")
        )
        y = attend(q, k, v, causal=True).reshape(*h.shape[:2], HEADS * WIDTH)
        x = x + jnp.einsum("btn,nd->btd", y, w["out"])
        h = jax.nn.gelu(jnp.einsum("btd,df->btf", x, w["up"]) + jnp.full((1, 1, w["up"].shape[1]), 0.1))
        return x + jnp.einsum("btf,fd->btd", h, w["down"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.einsum("btd,vd->btv", x, params["tokens"])


def of_next_token(logits, tokens):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()


def language_model(length=7):
    random = np.random.default_rng(0)
    n = HEADS * WIDTH
    shapes = {"scale": (DIM,), "bias": (DIM,), "query": (DIM, n), "key": (DIM, n), "value": (DIM, n), "out": (n, DIM)}
    shapes |= {"up": (DIM, HIDDEN), "down": (HIDDEN, DIM)}

    def draw(*shape):
        return jnp.asarray(0.4 * random.normal(size=shape), jnp.float32)

    params = {"tokens": draw(VOCABULARY, DIM), "positions": draw(LONGEST, DIM)}
    params["layers"] = {name: draw(2, *shape) for name, shape in shapes.items()}
    tokens = [jnp.asarray(random.integers(0, VOCABULARY, (4, length)), jnp.int32) for _ in range(2)]
    examples = [(each, each) for each in tokens]
    return Problem(function=decoder, params=params, loss=of_next_token, calibration=examples[0], held_out=examples[1])


@pytest.fixture(scope="module")
def pruned():
    subject = subject_of(language_model(), refused=True)
    random = np.random.default_rng(1)
    scores = {name: random.uniform(size=gate.shape) for name, gate in subject.ones.items()}
    return subject, chosen(subject, scores, 0.4).keep


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 16])
def test_masked_is_cut_at_other_lengths(pruned, length):
    subject, keep = pruned
    function, params = cut(subject, keep)
    tokens = jnp.asarray(np.random.default_rng(length).integers(0, VOCABULARY, (3, length)), jnp.int32)
    gates = subject.by_copies({name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()})
    traced = at_shapes(subject, (tokens[:1],))
    run = jax.jit(gated(traced))
    masked = jnp.concatenate([run(gates, subject.problem.params, row[None]) for row in tokens])
    np.testing.assert_allclose(jax.jit(function)(params, tokens), masked, rtol=1e-4, atol=1e-4)
    dense = decoder(subject.problem.params, tokens)
    assert masked.shape == dense.shape
    assert np.abs(masked - dense).max() > 1e-3


def test_a_shape_is_traced_once(pruned):
    subject, keep = pruned
    calls = []

    def counted(params, tokens):
        calls.append(tokens.shape)
        return decoder(params, tokens)

    subject = dataclasses.replace(subject, problem=dataclasses.replace(subject.problem, function=counted), programs={})
    function, params = cut(subject, keep)
    for count, length in ((2, 7), (1, 5), (3, 5), (2, 9), (1, 5), (2, 9)):
        jax.eval_shape(function, params, jnp.zeros((count, length), jnp.int32))
    assert calls == [(1, 5), (1, 9)]


def test_a_loaded_model_takes_other_lengths_and_refuses_what_the_dense_one_does(pruned, tmp_path):
    subject, keep = pruned
    small = subject.cut(keep)
    small.save(tmp_path / "model", keep)
    function, params = load_pruned(tmp_path / "model", language_model(5))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8, 9]], jnp.int32)
    np.testing.assert_allclose(function(params, tokens), small.function(small.params, tokens), rtol=1e-6)
    with pytest.raises(ValueError, match=r"cannot be traced with inputs int32\[1, 17\]: .*inputs that the dense model"):
        function(params, jnp.zeros((2, LONGEST + 1), jnp.int32))


def test_a_structure_that_is_another_at_another_length_is_refused(pruned):
    """Negative controls: beyond five tokens the code ties two structures, or reads one by position."""
    subject, keep = pruned

    def tied(params, tokens):
        out = decoder(params, tokens)
        if tokens.shape[1] > 7:
            layers = params["layers"]
            out = out + jnp.einsum("ldf,ldf->", layers["up"], layers["query"][..., : 2 * HIDDEN : 2])
        return out

    def read(params, tokens):
        out = decoder(params, tokens)
        return out + params["layers"]["up"][0, 0, 3] if tokens.shape[1] > 7 else out

    for function, message in (
        (tied, r"structure layers/.* with inputs int32\[1, 9\]: expected"),
        (read, r"structure layers/.* with inputs int32\[1, 9\]: expected .*"),
    ):
        other = dataclasses.replace(subject, problem=dataclasses.replace(subject.problem, function=function))
        run, params = cut(other, keep)
        jax.eval_shape(run, params, jnp.zeros((1, 6), jnp.int32))
        with pytest.raises(ValueError, match=message):
            run(params, jnp.zeros((1, 9), jnp.int32))
