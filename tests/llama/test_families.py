"""LLaMA's relatives: equal to a second implementation in numpy, to LLaMA where they should be, and to themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.ablation import ablate, sample_units
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.observe import observe
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.llama.generate import Sampling, generate
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.passes import packed_hidden
from saap_jax.llama.segments import existing_units, masks, ones_gates
from saap_jax.llama.spec import Apart
from saap_jax.structures.discovery import count_parameters, discover, prunable_parameters, unit_view
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from tests.helpers import (
    RELATIVES,
    changed,
    dense_model,
    forward,
    random_model,
    random_tokens,
    reference,
    relative,
)
from tests.llama.test_generate import PROMPTS, recomputed

TOKENS = random_tokens(2, 9)
BIASES = ("query_bias", "key_bias", "value_bias")
RAGGED = (2, 6), (2, 6), (1, 3), (0, 5)
"""A run of two layers, one of other widths, and one without attention."""


def logits(model, tokens=TOKENS, gates=None) -> np.ndarray:
    return np.asarray(forward(model, jnp.asarray(tokens), gates))


def differ(first, second) -> bool:
    return bool(np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-2)


def with_constants(model, **constants):
    """Return a model of the same arrays with other constants."""
    new = jax.tree.map(lambda leaf: leaf, model)
    new.constants = dataclasses.replace(model.constants, **constants)
    return new


@pytest.mark.slow
@pytest.mark.parametrize("family", RELATIVES)
def test_logits_equal_numpy(family):
    model = relative(family, *RAGGED)
    expected = np.stack([reference(model, row)[0] for row in TOKENS])
    near = 2e-4 if model.constants.traits.post_norms else 2e-5  # a norm enlarges what is written, and its rounding
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=near)
    assert differ(logits(model, TOKENS[::-1]), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"apart": None},
        {"apart": Apart(layers=(1,), sliding_window=3, rope_theta=100.0)},
        {"apart": Apart(layers=(0,), sliding_window=3, rope_theta=1e6)},
        {"apart": Apart(layers=(0,), sliding_window=None, rope_theta=100.0)},
        {"query_scalar": None},
    ],
    ids=["none", "another layer", "the base of all", "no window", "scores"],
)
def test_all_of_a_gemma_counts(change):
    """Negative control: with layers that see as the others do, or without a norm behind a sub-block, it is another."""
    model = relative("gemma3_text")
    other = relative("gemma3_text")
    other.constants = dataclasses.replace(model.constants, **change)
    assert differ(logits(other), logits(model))
    for name in ("attention_post_norm", "mlp_post_norm"):
        assert differ(logits(changed(model, f"segments/0/{name}", jnp.zeros_like)), logits(model))


# --- surgery and discovery -----------------------------------------------------------------------


def test_biases_are_members_and_norms_are_not():
    found = discover(relative("qwen2"))["attention"]
    assert [member.path for member in found.members] == [
        *("attention/key", "attention/key_bias", "attention/query", "attention/query_bias"),
        *("attention/value", "attention/value_bias", "attention/output"),
    ]
    plain = discover(dense_model())["attention"]
    assert found.parameters_per_unit[0] - plain.parameters_per_unit[0] == (2 + 2) * 4
    assert discover(relative("qwen3"))["attention"] == plain
    assert prunable_parameters(discover(relative("qwen3"))) == prunable_parameters(discover(dense_model()))


@pytest.mark.slow
@pytest.mark.parametrize("family", RELATIVES)
def test_masked_equals_cut(family):
    model = relative(family, *[(2, 6)] * 3)
    keep = existing_units(model.segments)
    keep["attention"][0, 0] = keep["attention"][2] = False
    keep["mlp"][1, [0, 4]] = False
    keep["mlp"][2, 1:] = False  # of a mixture, fewer experts than a token is routed to
    pruned = cut(model, keep)
    near = 4e-4 if model.constants.traits.post_norms else 2e-5  # a norm enlarges what is written, and its rounding
    np.testing.assert_allclose(logits(pruned), logits(model, gates=masks(keep)), rtol=0, atol=near)
    assert differ(logits(pruned), logits(model))
    assert count_parameters(pruned) == (subject := LlamaSubject(model)).parameters - subject.removed(keep)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_gate_gradients_are_sums_of_weight_times_gradient(family, x64):
    """∂ℒ/∂g = Σ w ∂w over the output, and over the value with its bias; not over the value alone."""
    model = relative(family, dtype=np.float64)
    batch = (random_tokens(3, 7), np.ones((3, 7), bool))
    statistics = observe(model, [batch], frozenset({GATE_GRADIENT, WEIGHT_GRADIENT}))
    (segment,), (gradient,) = model.segments, statistics.of(WEIGHT_GRADIENT).segments
    gates = np.mean(np.asarray(statistics.of(GATE_GRADIENT)["attention"]), axis=0)
    sums = {
        member.path.removeprefix("attention/"): np.einsum(
            "lur,lur->lu", *(np.asarray(unit_view(tree, member)) for tree in (segment, gradient))
        )
        for member in discover(model)["attention"].members
    }
    np.testing.assert_allclose(sums["output"], gates, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sums["value"] + sums.get("value_bias", 0.0), gates, rtol=1e-9, atol=1e-12)
    assert family == "qwen3" or not np.allclose(sums["value"], gates, rtol=1e-3)
    assert not np.allclose(sums["query"], gates, rtol=1e-3)


@pytest.mark.slow
def test_squared_gradients_of_biases_are_those_of_single_examples(x64):
    model, tokens = relative("qwen2", dtype=np.float64), random_tokens(3, 6)
    mask = np.ones(tokens.shape, bool)
    found = observe(model, [(tokens, mask)], frozenset({SQUARED_WEIGHT_GRADIENT}))
    squares = found.of(SQUARED_WEIGHT_GRADIENT).segments[0].attention

    @jax.jit
    def gradient(tokens):
        def loss(model):
            return next_token_losses(model, tokens, jnp.ones(tokens.shape, bool))[0].sum() / (tokens.size - 1)

        return jax.grad(loss)(model).segments[0].attention

    each = [gradient(jnp.asarray(row[None])) for row in tokens]
    for name in ("query", *BIASES):
        expected = np.mean([np.square(getattr(one, name)[...]) for one in each], axis=0)
        np.testing.assert_allclose(getattr(squares, name)[...], expected, rtol=1e-9, atol=1e-14)
        assert expected.max() > 1e-9


@pytest.mark.parametrize(
    "family",
    ["mistral", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "qwen3_moe", "gemma3_text"))],
)
def test_ablation_is_the_loss_with_one_gate_closed(family, x64):
    spec = relative(family).spec
    if family == "gemma3_text":  # a norm behind a sub-block is of the biases of compensation, too
        spec = dataclasses.replace(spec, output_biases=True)
    model, tokens = random_model(spec, dtype=np.float64), random_tokens(2, 9)
    mask = np.ones(tokens.shape, bool)
    units = [unit for unit in sample_units(existing_units(model.segments), 1) if unit.layer == 0]
    changes = ablate(model, [(tokens, mask)], units, at_once=2)

    @jax.jit
    def loss(gates):
        return next_token_losses(model, jnp.asarray(tokens), jnp.asarray(mask), gates)[0].sum() / float(
            mask[:, 1:].sum()
        )

    ones = ones_gates(model.segments)
    for unit, change in changes.items():
        closed = ones | {unit.structure: ones[unit.structure].at[unit.layer, unit.number].set(0.0)}
        assert change == pytest.approx(float(loss(closed) - loss(ones)), abs=1e-12)
        assert abs(change) > 1e-6


# --- decoding ------------------------------------------------------------------------------------


ALIKE = ((2, 6), (2, 6))
AT_ONCE = "mistral", "gemma3_text", "qwen3_moe"


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        *((family, ALIKE) for family in AT_ONCE),
        *(pytest.param(family, RAGGED, marks=pytest.mark.slow) for family in RELATIVES),
    ],
)
def test_generation_equals_recomputation(family, widths):
    """Prompts shorter and longer than the window, padded on the left, beyond which the cache goes on."""
    model = relative(family, *widths)
    ours = generate(model, PROMPTS, max_new_tokens=9, sampling=Sampling(stop_tokens=()))
    assert ours == [recomputed(model, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(row) for row in ours}) > 1
    if family == "mistral":  # control
        wider = with_constants(model, sliding_window=None)
        assert generate(wider, PROMPTS, max_new_tokens=9, sampling=Sampling(stop_tokens=())) != ours


@pytest.mark.slow
@pytest.mark.parametrize("family", RELATIVES)
def test_packed_texts_are_what_they_are_alone(family):
    """A text sees itself through the window, and nothing of the one before it."""
    model, row = relative(family), random_tokens(1, 9)[0]
    places = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]]), np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2]])
    packed = jax.jit(packed_hidden)(model, jnp.asarray(row[None]), *map(jnp.asarray, places))[0][0]
    alone = jax.jit(lambda model, tokens: model.hidden(tokens)[0][0])
    for text in (slice(0, 5), slice(5, 9)):
        np.testing.assert_allclose(packed[text], alone(model, jnp.asarray(row[None, text])), rtol=0, atol=2e-5)
    assert np.abs(packed[5:] - alone(model, jnp.asarray(row[None]))[5:]).max() > 1e-3, "control"
