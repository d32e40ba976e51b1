"""Generation with a cache is recomputation without one, whatever the shape of the model, the padding or the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.decoder import (
    FusedAttention,
    FusedMlp,
    Shared,
    cache_bytes,
    empty_cache,
    extend,
    fused_layers,
    single_layers,
)
from saap_jax.llama.generate import (
    STEPS,
    Sampling,
    decode_steps,
    generate,
    padded,
    prefill,
    settings_of,
    stops_of,
    stream,
)
from saap_jax.llama.model import Attention
from saap_jax.llama.product import product
from saap_jax.llama.spec import Constants, RopeScaling
from saap_jax.structures.discovery import weight_bytes
from tests.helpers import (
    RELATIVES,
    VOCAB,
    dense_model,
    forward,
    ragged_model,
    random_model,
    random_tokens,
    relative,
    spec_of,
)

ENDLESS = Sampling(stop_tokens=())
SAMPLINGS = [dataclasses.replace(ENDLESS, temperature=each, top_p=p) for each, p in ((1.0, 1.0), (0.7, 0.8))]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2]]
SCALING = RopeScaling(kind="llama3", factor=8.0, original_max_positions=32)
MODELS = {
    "mha": lambda **o: dense_model("mha", **o),
    "gqa": lambda **o: dense_model("gqa", layers=3, tied=True, **o),
    "mqa": lambda **o: dense_model("mqa", **o),
    "ragged": ragged_model,
    "biases": lambda **o: dense_model("gqa", output_biases=True, **o),
    "llama3 positions": lambda **o: random_model(scaled_spec(), **o),
    "no heads at all": lambda **o: random_model(spec_of((0, 6), (0, 6)), **o),
    "no channels": lambda **o: random_model(spec_of((2, 0), (2, 0), (1, 6)), **o),
    "nothing left": lambda **o: random_model(spec_of((0, 0), (2, 4)), **o),
    "queries differ": lambda **o: mixed_queries(**o),
}


def scaled_spec():
    return dataclasses.replace(spec_of((2, 6), (2, 6)), constants=Constants(rope_scaling=SCALING))


def mixed_queries(**options):
    """Return a model whose layers have different numbers of query heads a key/value head."""
    first, second = spec_of((2, 6), q_per_kv=2), spec_of((2, 6), q_per_kv=1)
    return random_model(dataclasses.replace(first, layers=first.layers + second.layers), **options)


def recomputed(model, prompt: list[int], count: int) -> list[int]:
    """Return the greedy continuation, the whole text anew for each token; padding on the right changes nothing."""
    tokens, length = np.zeros((1, 32), np.int32), len(prompt)
    tokens[0, :length] = prompt
    for place in range(length, length + count):
        tokens[0, place] = np.asarray(forward(model, tokens))[0, place - 1].argmax()
    return tokens[0, length : length + count].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_equals_recomputation(name):
    """Prompts of different lengths in one batch, so three of four are padded."""
    model = MODELS[name]()
    ours = generate(model, PROMPTS, max_new_tokens=9, sampling=ENDLESS)
    assert ours == [recomputed(model, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(row) for row in ours}) > 1 or name == "no heads at all"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "ragged", "mistral", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("sampling", [ENDLESS, dataclasses.replace(SAMPLINGS[1], top_k=9)], ids=["greedy", "drawn"])
def test_float64_writes_what_float32_does(name, sampling, x64):
    make = MODELS[name] if name in MODELS else lambda **o: relative(name, **o)
    single, double = (
        generate(make(dtype=dtype), PROMPTS, max_new_tokens=40, sampling=sampling) for dtype in (np.float32, np.float64)
    )
    assert make(dtype=np.float64).embedding.dtype == np.float64
    assert double == single
    other = dataclasses.replace(sampling, temperature=2.0, seed=1)
    assert generate(make(dtype=np.float64), PROMPTS, max_new_tokens=40, sampling=other) != single, "control"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, np.float32) for name in ("gqa", "ragged", "biases")),
        pytest.param("biases", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", [lambda model: model, single_layers, fused_layers], ids=["runs", "single", "fused"])
def test_logits_of_prompt_and_steps(name, dtype, form):
    """`extend`, over a padded prompt and then token by token, gives the hidden states of the whole forward pass."""
    model, tokens = MODELS[name](dtype=dtype), random_tokens(2, 12)
    expected = np.asarray(forward(model, jnp.asarray(tokens)), np.float32)
    logits = jax.jit(lambda hidden: model.logits(hidden))
    shifted = np.zeros((2, 16), np.int32)  # the second row is shorter by two
    shifted[0, :12], shifted[1, 2:12] = tokens[0], tokens[1, :10]
    start, used = jnp.asarray([0, 2], jnp.int32), form(model)
    step = jax.jit(extend, static_argnames="empty")
    hidden, cache = step(used, jnp.asarray(shifted[:, :8]), empty_cache(used, 2, 16), start, jnp.int32(0), empty=True)
    seen = [np.asarray(logits(hidden), np.float32)]
    for slot in range(8, 12):
        hidden, cache = step(used, jnp.asarray(shifted[:, slot : slot + 1]), cache, start, jnp.int32(slot), empty=False)
        seen.append(np.asarray(logits(hidden), np.float32))
    ours = np.concatenate(seen, axis=1)
    tolerance = 2e-5 if dtype == np.float32 else 0.15
    np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours[1, 2:], expected[1, :10], rtol=0, atol=tolerance)
    assert np.isfinite(ours).all()
    assert np.abs(ours[1, 1:-1] - expected[1, :10]).max() > 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [ENDLESS, *SAMPLINGS])
def test_a_row_does_not_depend_on_its_batch(sampling):
    model = ragged_model()
    rows = generate(model, PROMPTS, max_new_tokens=7, sampling=sampling)
    for batch_size in (1, 3):
        again = generate(model, PROMPTS, max_new_tokens=7, sampling=sampling, batch_size=batch_size)
        assert again == rows
    if sampling.temperature:
        seeded = dataclasses.replace(sampling, seed=1)
        assert generate(model, PROMPTS, max_new_tokens=7, sampling=seeded) != rows


def test_stop_tokens_end_a_row_and_are_not_part_of_it():
    model = dense_model()
    whole = generate(model, PROMPTS, max_new_tokens=20, sampling=ENDLESS)
    stop = whole[1][4]
    ours = generate(model, PROMPTS, max_new_tokens=20, sampling=Sampling(stop_tokens=[stop]))
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert ours == expected
    assert ours != whole
    assert generate(model, PROMPTS, max_new_tokens=20) == whole  # this model names no end token


@pytest.mark.slow
def test_more_tokens_than_one_call_makes():
    model = dense_model()
    count = 2 * STEPS + 3
    rows = generate(model, [[7, 7]], max_new_tokens=count, sampling=ENDLESS)
    assert len(rows[0]) == count
    streamed = stream(model, [[7, 7]], max_new_tokens=count, sampling=ENDLESS)
    assert [token for _, token in streamed] == rows[0]


def test_stream_yields_what_generate_returns_row_by_row():
    model = ragged_model()
    pairs = list(stream(model, PROMPTS, max_new_tokens=6, sampling=ENDLESS, batch_size=4))
    assert [row for row, _ in pairs[:4]] == [row for row, _ in pairs[4:8]]
    rows = generate(model, PROMPTS, max_new_tokens=6, sampling=ENDLESS)
    assert [[token for place, token in pairs if place == row] for row in range(4)] == rows


@pytest.mark.parametrize("steps", [1, 5, STEPS])
def test_a_row_can_be_ended_from_outside(steps):
    model = dense_model()
    whole = generate(model, PROMPTS, max_new_tokens=10, sampling=ENDLESS)

    def finished(row, tokens):
        return row == 2 and len(tokens) == 3

    pairs = stream(model, PROMPTS, max_new_tokens=10, sampling=ENDLESS, finished=finished, steps=steps)
    rows = [[] for _ in PROMPTS]
    for row, token in pairs:
        rows[row].append(token)
    assert rows == [whole[0], whole[1], whole[2][:3], whole[3]]


@pytest.mark.slow
def test_programs_compile_once_a_shape():
    """Neither lengths within a bucket, nor draws, stops and counts of tokens compile anything new."""
    model = dense_model("mqa", mlp=10)
    before = prefill._cache_size(), decode_steps._cache_size()
    generate(model, [[1, 2, 3], [4]], max_new_tokens=5, sampling=ENDLESS)
    assert (prefill._cache_size(), decode_steps._cache_size()) == (before[0] + 1, before[1] + 1)
    generate(model, [[1] * 9, [4, 5]], max_new_tokens=4, sampling=Sampling(temperature=1.0, top_k=3, stop_tokens=[3]))
    list(stream(model, [[1] * 16, [4, 5]], max_new_tokens=6, sampling=Sampling(top_p=0.3, seed=9)))
    assert (prefill._cache_size(), decode_steps._cache_size()) == (before[0] + 1, before[1] + 1)
    generate(model, [[1] * 17, [4, 5]], max_new_tokens=4)
    assert prefill._cache_size() == before[0] + 2


@pytest.mark.slow
def test_the_cache_is_reused_in_place():
    model = single_layers(ragged_model())
    inputs = padded(PROMPTS, 4)
    keys = jax.random.split(jax.random.key(0), 4)
    settings, stops = settings_of(Sampling()), stops_of(())
    _, state = prefill(model, inputs, keys, settings, stops, slots=64)
    places = [segment.keys.unsafe_buffer_pointer() for segment in state.cache if segment.keys.size]
    _, after = decode_steps(model, state, settings, stops, jnp.int32(3))
    assert all(segment.keys.is_deleted() for segment in state.cache if segment.keys.size)
    assert [segment.keys.unsafe_buffer_pointer() for segment in after.cache if segment.keys.size] == places
    assert int(after.slot) == inputs.tokens.shape[1] + 3


def test_cache_bytes_count_one_key_and_value_a_kv_head():
    model = dense_model("gqa", layers=3)
    assert cache_bytes(model, 2, 16) == 2 * 3 * 2 * 2 * 16 * 4 * 4
    assert cache_bytes(single_layers(model), 2, 16) == cache_bytes(model, 2, 16)
    assert cache_bytes(random_model(spec_of((0, 6))), 2, 16) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "ragged", "biases", "no heads at all", "qwen2", "qwen3"])
def test_fused_layers_are_the_same_function_of_larger_matrices(name):
    """And single ones of more runs."""
    model = relative(name) if name in RELATIVES else MODELS[name]()
    fused, tokens = fused_layers(model), random_tokens(2, 7)
    assert all(
        isinstance(segment.attention, FusedAttention) and isinstance(segment.mlp, FusedMlp)
        for segment in fused.segments
    )
    assert fused.spec == model.spec
    assert weight_bytes(fused) == weight_bytes(model)
    np.testing.assert_allclose(forward(fused, tokens), forward(model, tokens), rtol=0, atol=1e-5)
    single = single_layers(model)
    assert [segment.length for segment in single.segments] == [1] * len(model.spec.layers)
    np.testing.assert_allclose(forward(single, tokens), forward(model, tokens), rtol=0, atol=1e-5)
    assert fused_layers(fused) is fused
    assert type(model.segments[0].attention) is Attention  # the model that it was made of is as it was


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
def test_products_of_shared_matrices_are_those_of_the_matrix(rows, parts):
    axes, sizes = ("layers", "kv_heads", "q_per_kv", "head_dim", "embed"), (3, 2, 5, 4)
    value = jnp.asarray(np.random.default_rng(0).normal(size=(1, *sizes)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*rows, 30)))
    shared = Shared(axes, value, parts)
    assert shared.shape == value.shape
    np.testing.assert_array_equal(shared.dense(), value)
    layer = jax.tree.map(lambda leaf: leaf[0], shared)
    assert layer.shape == sizes
    expected = jnp.einsum("btf,fd->btd", x, value.reshape(30, 4))
    np.testing.assert_allclose(product("btf,fd->btd", x, layer), expected, rtol=0, atol=1e-6)
    assert np.abs(product("btf,fd->btd", jnp.roll(x, 1, axis=-1), layer) - expected).max() > 1e-2


ALONE = [("no heads at all", 2), ("gqa", 1), ("biases", 5)]


@pytest.mark.parametrize(
    ("name", "parts"), [("ragged", 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ALONE)]
)
def test_rows_decoded_alone_are_those_of_recomputation(name, parts):
    """One row is the case in which matrices are read in parts."""
    model = MODELS[name]()
    fused = fused_layers(model, parts)
    for prompt in PROMPTS:
        assert generate(fused, [prompt], max_new_tokens=6, sampling=ENDLESS) == [recomputed(model, prompt, 6)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1: expected at least one token, got none"),
        ([[1, VOCAB]], {}, f"prompt 0: expected tokens in 0 … {VOCAB - 1}, got 1 … {VOCAB}"),
        ([[-1]], {}, "prompt 0: expected tokens in 0"),
        ([[1] * 2040], {"max_new_tokens": 9}, "2040 tokens and 9 new ones make 2049, more than the model's 2048 pos"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([[1]], {"batch_size": 0}, "batch_size >= 1 .* got 0"),
    ],
)
def test_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(dense_model(), prompts, **{"max_new_tokens": 4, **options})
