"""Adapters compute what their formulas say, and a merged model computes what the adapted one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.decoder import single_layers
from saap_jax.llama.generate import Sampling, generate
from saap_jax.llama.product import inputs_and_outputs
from saap_jax.llama.quantized import MATRICES, Quantized, quantization_of
from saap_jax.recovery.adapters import METHODS, Adapted, AdapterParam, full, groupwise, lora, merged
from saap_jax.recovery.quantization import quantize
from saap_jax.structures.discovery import count_parameters, weight_bytes
from tests.helpers import forward, random_tokens
from tests.recovery.models import constant_groups, pruned_model, trained

TOKENS = jnp.asarray(random_tokens(2, 7))
KEY = jax.random.key(0)


def matrices_of(model):
    """Yield (name, matrix) of every run."""
    for run in model.segments:
        for name, block in MATRICES.items():
            yield name, getattr(getattr(run, block), name)


def logits(model):
    return np.asarray(forward(model, TOKENS))


def close(got, expected, tolerance=1e-5):
    """Assert equality within a share of the largest value."""
    assert np.abs(got - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1e-30)


def layer_of(matrix, layer=0):
    return jax.tree.map(lambda leaf: leaf[layer], matrix)


@jax.jit
def everything_of(model, x):
    """Return the logits, each matrix in floats, and the product of each first layer with as many of `x` as it takes."""
    matrices = [matrix for _, matrix in matrices_of(model)]
    products = [
        layer_of(matrix).product("btd,df->btf", x[:, :, : inputs_and_outputs(matrix)[0]]) for matrix in matrices
    ]
    return model(TOKENS), [matrix.dense() for matrix in matrices], products


X = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 16)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "groupwise"])
def test_a_fresh_adapter_changes_nothing(method):
    """Against the model itself, and the quantised one; after training it does change something."""
    model = pruned_model()
    options = {} if method == "lora" else {"group_size": 8}
    prepared = METHODS[method](rank=2, **options).prepare(model, KEY)
    base = model if method == "lora" else quantize(model, group_size=8)
    np.testing.assert_array_equal(logits(prepared), logits(base))
    assert np.abs(logits(trained(prepared, AdapterParam)) - logits(base)).max() > 0.1


@pytest.mark.slow
def test_adapters_follow_the_formula():
    """y = x·α(q − β) + (η/r)·pool(x)·A·B by a loop over groups, in float64; pool is the mean."""
    prepared = groupwise(group_size=8, bits=4, rank=2, scale=6.0).prepare(pruned_model(), KEY)
    model = trained(prepared, AdapterParam)
    products, plain = everything_of(model, X)[2], everything_of(prepared, X)[1]
    for (name, matrix), product, base in zip(matrices_of(model), products, plain, strict=True):
        inputs, outputs = inputs_and_outputs(matrix)
        x = np.asarray(X[0, :, :inputs], np.float64)
        a, b = (np.asarray(each[...][0], np.float64) for each in (matrix.a, matrix.b))
        expected = without = x @ np.asarray(base[0], np.float64).reshape(inputs, outputs)
        for group in range(inputs // 8):
            expected = expected + 6.0 / 2 * x[:, 8 * group : 8 * group + 8].mean(axis=1)[:, None] * (a[group] @ b)
        close(np.asarray(product).reshape(expected.shape), expected)
        assert not expected.size or not inputs or np.abs(expected - without).max() > 1e-2, name


@pytest.mark.parametrize(
    ("bits", "size"),
    [(4, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((3, 8), (8, 8)))],
)
def test_groupwise_merges_exactly(bits, size):
    """Every matrix of every run, constant and zero ones too, its product, and the logits; size and integers stay."""
    model = constant_groups(pruned_model())
    method = groupwise(bits=bits, group_size=size, rank=2, rounding="nearest")
    learned = trained(method.prepare(model, KEY), method.trainable)
    merged_model = method.merge(learned)
    expected, got = everything_of(learned, X), everything_of(merged_model, X)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        close(np.asarray(other), np.asarray(one))
    assert len(got[1]) == 7 * 3
    quantised = quantize(model, bits=bits, group_size=size, rounding="nearest")
    assert np.abs(logits(quantised) - got[0]).max() > 0.1
    assert weight_bytes(merged_model) == weight_bytes(quantised)
    assert jax.tree.structure(merged_model) == jax.tree.structure(quantised)
    assert count_parameters(merged_model) == count_parameters(model)
    for (_, one), (_, other) in zip(matrices_of(quantised), matrices_of(merged_model), strict=True):
        assert isinstance(other, Quantized)
        np.testing.assert_array_equal(one.packed[...], other.packed[...])
        np.testing.assert_array_equal(one.scale[...], other.scale[...])


@pytest.mark.slow
def test_the_zero_points_take_the_adapter():
    """β' = β − (η/r)(A·B)/(s·α), the formula of the method, on the zero points themselves."""
    learned = trained(groupwise(group_size=8, rank=2, scale=6.0).prepare(pruned_model(), KEY), AdapterParam)
    for (_, before), (_, after) in zip(matrices_of(learned), matrices_of(merged(learned)), strict=True):
        scale = np.asarray(before.base.scale[...])
        change = 6.0 / 2 * np.einsum("ljr,lro->ljo", before.a[...], before.b[...]) / (8 * scale)
        np.testing.assert_allclose(after.zero, before.base.zero - change, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_lora_merges_into_floats():
    model = pruned_model()
    method = lora(rank=3, matrices=("query", "output", "down"))
    learned = trained(method.prepare(model, KEY), method.trainable)
    after = method.merge(learned)
    assert jax.tree.structure(after) == jax.tree.structure(model)
    close(logits(after), logits(learned))
    assert np.abs(logits(after) - logits(model)).max() > 0.1
    for (name, matrix), (_, old) in zip(matrices_of(after), matrices_of(model), strict=True):
        changed = matrix[...].size > 0 and not np.array_equal(matrix[...], old[...])
        assert changed == (name in ("query", "output", "down") and matrix[...].size > 0)


def test_what_a_quantised_model_cannot_take_is_refused():
    """Which is said before anything is trained."""
    quantised = quantize(pruned_model(), group_size=8)
    with pytest.raises(ValueError, match="model: expected adapters over groups of 8 inputs .* got 1"):
        lora(rank=2, matrices=("down",)).prepare(quantised, KEY)
    with pytest.raises(ValueError, match="model: expected floats, since all are trained"):
        full().prepare(quantised, KEY)


@pytest.mark.slow
def test_gradients_of_an_adapter_are_those_of_its_dense_matrix():
    """Differentiating through the quantised product and the pooled adapter, against plain floats of the same value."""
    model = trained(groupwise(group_size=8, rank=2).prepare(pruned_model(), KEY), AdapterParam)
    matrix = layer_of(model.segments[0].mlp.down)
    dense = matrix.dense()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, dense.shape[0])), jnp.float32)
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(matrix.product("btf,fd->btd", x))))(x)
    theirs = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.einsum("btf,fd->btd", x, dense))))(x)
    close(np.asarray(ours), np.asarray(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["adapted", "merged"])
def test_decoding_agrees_with_the_forward_pass(stage):
    """Greedy tokens with a cache, of the stacked and of the single-layer form, are those of whole forward passes."""
    method = groupwise(group_size=8, rank=2)
    model = trained(method.prepare(pruned_model(), KEY), method.trainable)
    model = model if stage == "adapted" else method.merge(model)
    prompt = random_tokens(1, 6)[0].tolist()
    made = generate(single_layers(model), [prompt], max_new_tokens=6, sampling=Sampling(stop_tokens=()))[0]
    tokens = jnp.asarray([prompt + made])
    expected = np.asarray(forward(model, tokens))[0].argmax(-1)
    assert expected[len(prompt) - 1 : -1].tolist() == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"scale": 0.0}, "scale: expected a positive number, got 0.0"),
        ({"matrices": ("query", "wq")}, "matrices: expected some of query, key, .* got 'query, wq'"),
        ({"matrices": ("up", "up")}, "each once"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "groupwise"])
def test_bad_settings_are_refused_before_a_model_is_there(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](**options)


def test_adapters_do_not_stack():
    prepared = lora(rank=2).prepare(pruned_model(), KEY)
    with pytest.raises(ValueError, match="expected one without adapters"):
        lora(rank=2).prepare(prepared, KEY)
    with pytest.raises(ValueError, match="quantize: expected a model whose matrices are plain floats, got Adapted"):
        quantize(prepared)
    with pytest.raises(ValueError, match="got Adapted for query; merge it first"):
        quantization_of(prepared)
    assert isinstance(prepared.segments[0].mlp.up, Adapted)
