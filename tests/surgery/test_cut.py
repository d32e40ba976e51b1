"""Surgery: a masked model and a cut one are the same function of tokens."""

from itertools import groupby

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from saap_jax.data.windows import Windows, calibration_windows, evaluation_windows
from saap_jax.estimation.observe import observe, score
from saap_jax.estimation.registry import make_estimators
from saap_jax.llama.model import random_llama
from saap_jax.llama.segments import existing_units, masks
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.runs.stages import Stage, measuring
from saap_jax.steps.allocation.allocation import choose
from saap_jax.steps.allocation.allocations import Global, Uniform
from saap_jax.steps.limits import Within
from saap_jax.subjects.base import run_losses
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.helpers import HEADS, changed, dense_model, forward, ragged_model, random_keep, random_tokens

TOKENS = jnp.asarray(random_tokens(2, 6))
few_examples = hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)


def keep_of(attention: list[list[int]], mlp: list[list[int]]) -> dict[str, np.ndarray]:
    return {"attention": np.asarray(attention, bool), "mlp": np.asarray(mlp, bool)}


def masked_and_cut(model, keep) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(forward(model, TOKENS, masks(keep))), np.asarray(forward(cut(model, keep), TOKENS))


@st.composite
def keeps(draw, kv_heads: int, mlp: int):
    """Draw any keep-set of three layers, whole layers emptied included."""
    widths = {"attention": kv_heads, "mlp": mlp}
    rows = {
        n: st.one_of(st.just([False] * w), st.lists(st.booleans(), min_size=w, max_size=w)) for n, w in widths.items()
    }
    return {name: np.asarray([draw(row) for _ in range(3)], bool) for name, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@few_examples
@hypothesis.given(data=st.data())
def test_masked_equals_cut(heads, data):
    keep = data.draw(keeps(HEADS[heads][0], 5))
    masked, pruned = masked_and_cut(dense_model(heads, layers=3, mlp=5), keep)
    np.testing.assert_allclose(masked, pruned, rtol=0, atol=2e-5)


EMPTIED = keep_of([[1, 1], [0, 0], [0, 1], [0, 0]], [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0] * 5, [0] * 5])
"""A layer without attention, one without MLP, and one without either."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "atol", "biases"), [(np.float32, 2e-5, False), (np.float64, 1e-10, False), (np.float32, 2e-5, True)]
)
def test_masked_equals_cut_where_layers_are_emptied(dtype, atol, biases):
    """Output biases are added whatever is left of a layer."""
    with jax.enable_x64(dtype == np.float64):
        model = dense_model(layers=4, mlp=5, dtype=dtype, output_biases=biases)
        masked, pruned = masked_and_cut(model, EMPTIED)
        assert pruned.dtype == dtype
        np.testing.assert_allclose(masked, pruned, rtol=0, atol=atol)
        assert np.abs(masked - np.asarray(forward(model, TOKENS))).max() > 1e-2
        if biases:
            without = changed(model, "segments/0/attention/output_bias", jnp.zeros_like)
            assert np.abs(masked - np.asarray(forward(without, TOKENS, masks(EMPTIED)))).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_one_unit_swapped_gives_another_model(name):
    """The negative control: the same widths, one other unit."""
    model = dense_model(layers=2, mlp=5)
    keep = keep_of([[1, 0], [1, 1]], [[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    other = {n: kept.copy() for n, kept in keep.items()}
    other[name][0, :3] = keep[name][0, :3][::-1]
    assert cut(model, other).spec == cut(model, keep).spec
    masked, _ = masked_and_cut(model, keep)
    _, pruned = masked_and_cut(model, other)
    assert np.abs(masked - pruned).max() > 1e-2


def test_cutting_twice_equals_cutting_once():
    """Units of the cut model are the kept ones of the first, in their order."""
    model = dense_model(layers=3, mlp=5)
    first = keep_of([[1, 1], [0, 1], [1, 1]], [[1, 1, 0, 1, 1], [0, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    once = keep_of([[0, 1], [0, 1], [1, 1]], [[1, 0, 0, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    between = cut(model, first)
    second = existing_units(between.segments)
    for name in STRUCTURES:
        for layer in range(3):
            second[name][layer, : first[name][layer].sum()] = once[name][layer][first[name][layer]]
    twice, direct = cut(between, second), cut(model, once)
    assert twice.spec == direct.spec != between.spec
    jax.tree.map(np.testing.assert_array_equal, twice, direct)


def test_keeping_everything_changes_nothing():
    for model in (dense_model(layers=3), ragged_model()):
        same = cut(model, existing_units(model.segments))
        assert same.spec == model.spec
        assert jax.tree.structure(same) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, same, model)


def test_number_of_runs_is_minimal():
    """A run for each stretch of neighbouring layers of equal widths, also across the old runs."""
    model = ragged_model()
    keep = existing_units(model.segments)
    keep["mlp"][:, 3:] = False
    keep["attention"][0, 1] = False
    keep["attention"][1, 0] = False
    pruned = cut(model, keep)
    widths = list(zip(keep["attention"].sum(axis=1), keep["mlp"].sum(axis=1), strict=True))
    assert [(int(a), int(m)) for a, m in widths] == [(1, 3), (1, 3), (1, 3), (0, 3)]
    assert (
        [segment.length for segment in pruned.segments]
        == [len(list(stretch)) for _, stretch in groupby(widths)]
        == [3, 1]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keep: {"mlp": keep["mlp"]}, r"keep: expected attention of shape \(4, 2\) .*, got nothing"),
        (lambda keep: {**keep, "mlp": keep["mlp"][:, :5]}, r"keep: expected mlp of shape \(4, 6\) .*, got \(4, 5\)"),
        (lambda keep: {**keep, "mlp": keep["mlp"][:3]}, r"keep: expected mlp of shape \(4, 6\) .*, got \(3, 6\)"),
        (lambda keep: {**keep, "attention": np.ones((4, 2), bool)}, "keep: attention unit 1 of layer 2 does not exist"),
    ],
)
def test_wrong_keep_is_refused(change, message):
    model = ragged_model()
    keep = existing_units(model.segments)
    cut(model, keep)
    with pytest.raises(ValueError, match=message) as error:
        cut(model, change(keep))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_real_model_masked_equals_cut(smollm2, x64):
    """30 % of the parameters of SmolLM2-135M at random, layers of many widths; in float64.

    Such a model amplifies rounding: in float32 its logits, masked or cut, are up to 1e-2 from those in float64.
    """
    model = jax.tree.map(lambda x: x.astype(jnp.float64), smollm2)
    existing = existing_units(model.segments)
    scores = {name: np.random.default_rng(3).random(units.shape) for name, units in existing.items()}
    within = Within(multiple_of={"mlp": 256})
    keep = choose(LlamaSubject(model), scores, 0.3, Global(by="score"), within).keep
    pruned = cut(model, keep)
    assert len(pruned.segments) > 3
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.spec.vocab, (2, 32), np.int32))
    masked = np.asarray(forward(model, tokens, masks(keep)))
    np.testing.assert_allclose(masked, np.asarray(forward(pruned, tokens)), rtol=0, atol=1e-10)
    assert np.abs(masked - np.asarray(forward(model, tokens))).max() > 1


@pytest.mark.slow
def test_real_model_masked_equals_cut_in_float32(smollm2, smollm2_tokenizer):
    """What `saap compare` does with SmolLM2-135M: an estimator's keep-set, within 5e-4 (logits reach 40)."""
    model, windows = smollm2, calibration_windows("builtin:reference", smollm2_tokenizer, 2, 64, 0)
    wanda = make_estimators(["wanda"])
    scores = score(wanda, observe(model, [tuple(windows)], wanda["wanda"].needs), model)["wanda"]
    keep = choose(LlamaSubject(model), scores, 0.5, Uniform(), Within(protect=(0, 1, 2, 3, -2, -1))).keep
    tokens = jnp.asarray(evaluation_windows("builtin:descriptions", smollm2_tokenizer, 64, 2).tokens)
    masked, pruned = forward(model, tokens, masks(keep)), forward(cut(model, keep), tokens)
    np.testing.assert_allclose(np.asarray(masked), np.asarray(pruned), rtol=0, atol=5e-4)
    assert (masked.argmax(-1) == pruned.argmax(-1)).all()
    swapped = {name: np.roll(kept, 1, axis=1) for name, kept in keep.items()}
    assert np.abs(np.asarray(masked - forward(model, tokens, masks(swapped)))).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "far"), [("float32", False), ("bfloat16", True)])
def test_masked_and_cut_are_within_the_tolerance_of_their_type(dtype, far):
    """In bfloat16 roundings alone put their perplexities more than 0.1 % apart."""
    layers = (LayerWidths(kv_heads=4, q_per_kv=1, mlp=512),) * 8
    model = random_llama(LlamaSpec(vocab=64, embed=128, head_dim=16, layers=layers, tied=True), jax.random.key(0))
    subject = LlamaSubject(jax.tree.map(lambda x: x.astype(dtype), model))
    text = Windows(np.random.default_rng(0).integers(0, 64, (4, 16), np.int32), np.ones((4, 16), bool))
    keep = {name: units.copy() for name, units in subject.existing.items()}
    keep["mlp"][:, ::3] = keep["attention"][:, 0] = False
    masked, small = run_losses(subject, text, keep, 2).perplexity, subject.cut(keep).losses(text, 2).perplexity
    assert abs(small / masked - 1) <= subject.tolerance
    assert (abs(small / masked - 1) > 1e-3) == far


def test_what_lies_on_the_host_is_cut_without_a_program():
    model, stage = dense_model(), Stage("cut")
    keep = random_keep(existing_units(model.segments), 0.6)
    with measuring(stage):
        pruned = cut(model, keep)
    assert stage.compiles == 0
    assert {type(leaf) for leaf in jax.tree.leaves(pruned)} == {type(model.embedding[...])}
    with measuring(stage):
        jnp.take(model.embedding[...], np.arange(3), axis=0)
    assert stage.compiles == 1, "control"
