"""Query heads told apart: gates, surgery and files, against the ungrouped model and the one in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import calibrate, perplexity
from saap_jax.data import Windows
from saap_jax.estimation import ESTIMATORS, GATE_GRADIENT, GATE_HESSIAN, Curvature, observe
from saap_jax.evaluation.candidates import candidate_losses
from saap_jax.llama import LayerWidths, LlamaSpec, load_keep, load_model, save_model
from saap_jax.llama.segments import existing_query_heads, existing_units, masks, ones_gates
from saap_jax.llama.ungroup import ungrouped
from saap_jax.structures import count_parameters
from saap_jax.surgery.counting import kept_parameters
from saap_jax.surgery.cut import cut, keep_from_json, keep_to_json
from saap_jax.types import QUERY_HEADS, STRUCTURES
from tests.helpers import dense_model, forward, length_mask, losses_of, random_model, random_tokens, reference

TOKENS = jnp.asarray(random_tokens(3, 7))
WIDTHS = ((2, 3, 5), (2, 3, 5), (1, 2, 4), (0, 3, 5), (3, 1, 0))
"""(kv_heads, q_per_kv, mlp) of each layer: runs of many kinds, a layer without attention, one without groups."""


def mixed_model(widths=WIDTHS, **options):
    layers = tuple(LayerWidths(kv_heads=k, q_per_kv=g, mlp=f) for k, g, f in widths)
    return random_model(LlamaSpec(vocab=24, embed=8, head_dim=4, layers=layers, tied=False), **options)


def keep_of(model) -> dict[str, np.ndarray]:
    """Return a keep-set of `mixed_model`: other query heads in each group, a KV head and channels gone too."""
    keep = existing_units(model.segments) | {QUERY_HEADS: existing_query_heads(model.segments)}
    keep["attention"][1, 0] = keep["attention"][4, 1] = False
    keep["mlp"][0, [1, 3]] = False
    keep[QUERY_HEADS][0] = [0, 1, 1, 1, 0, 1]
    keep[QUERY_HEADS][1] = [0, 0, 0, 0, 0, 1]
    keep[QUERY_HEADS][2, 0] = keep[QUERY_HEADS][4, 1] = False
    return keep


def windows_of() -> Windows:
    return Windows(np.asarray(TOKENS), length_mask(7, 5, 6, seq=7))


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense_model, mixed_model])
def test_ungrouped_computes_the_same(make, x64):
    model = make(dtype=np.float64)
    plain = ungrouped(model)
    np.testing.assert_allclose(forward(plain, TOKENS), forward(model, TOKENS), rtol=0, atol=1e-12)
    assert all(layer.q_per_kv == 1 for layer in plain.spec.layers)
    heads = existing_units(plain.segments)["attention"]
    np.testing.assert_array_equal(heads, existing_query_heads(model.segments))
    copies = sum(2 * w.kv_heads * (w.q_per_kv - 1) * 4 * 8 for w in model.spec.layers)
    assert count_parameters(plain) - count_parameters(model) == copies > 0


@pytest.mark.slow
def test_the_gate_of_a_query_head_is_the_gate_of_its_unit_in_the_ungrouped_model(x64):
    model, random = mixed_model(dtype=np.float64), np.random.default_rng(3)
    heads = jnp.asarray(random.random(existing_query_heads(model.segments).shape))
    ones = ones_gates(model.segments)
    gated = np.asarray(forward(model, TOKENS, ones | {QUERY_HEADS: heads}))
    plain = np.asarray(forward(ungrouped(model), TOKENS, ones | {"attention": heads}))
    np.testing.assert_allclose(gated, plain, rtol=0, atol=1e-12)
    other = forward(model, TOKENS, ones | {QUERY_HEADS: jnp.roll(heads, 1, axis=1)})
    assert np.abs(gated - np.asarray(other)).max() > 1e-2


def test_head_numbers_are_those_of_the_reference(x64):
    """Head k · q_per_kv + g gated to 0 is the model in numpy with output[k, g] = 0."""
    model = dense_model(dtype=np.float64)
    for head in range(4):
        k, g = divmod(head, 2)
        gates = ones_gates(model.segments) | {QUERY_HEADS: jnp.ones((2, 4)).at[1, head].set(0)}
        without = dense_model(dtype=np.float64)
        without.segments[0].attention.output[...] = without.segments[0].attention.output[...].at[1, k, g].set(0)
        tokens = np.asarray(TOKENS[0])
        np.testing.assert_allclose(forward(model, TOKENS, gates)[0], reference(without, tokens)[0], rtol=0, atol=1e-6)


def test_the_gradient_of_a_unit_is_the_sum_over_its_query_heads(x64):
    model, mask = dense_model(dtype=np.float64), jnp.asarray(windows_of().mask)
    ones = ones_gates(model.segments)
    loss = lambda gates: jnp.sum(losses_of(model, TOKENS, mask, gates))  # noqa: E731
    found = jax.tree.map(np.asarray, jax.grad(loss)(ones | {QUERY_HEADS: jnp.ones((2, 4))}))
    summed = found[QUERY_HEADS].reshape(2, 2, 2).sum(axis=2)
    np.testing.assert_allclose(summed, found["attention"], rtol=1e-5)
    assert np.abs(found[QUERY_HEADS][:, ::2] - found["attention"]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 2e-5), (np.float64, 1e-10)])
def test_masked_equals_cut(dtype, atol):
    with jax.enable_x64(dtype == np.float64):
        model = mixed_model(dtype=dtype)
        keep = keep_of(model)
        masked, pruned = np.asarray(forward(model, TOKENS, masks(keep))), cut(model, keep)
        np.testing.assert_allclose(masked, forward(pruned, TOKENS), rtol=0, atol=atol)
        widths = [(w.kv_heads, w.q_per_kv, w.mlp) for w in pruned.spec.layers]
        assert widths == [(2, 2, 3), (1, 1, 5), (1, 1, 4), (0, 3, 5), (2, 1, 0)]
        assert count_parameters(pruned) == kept_parameters(model, keep).all
        other = keep | {QUERY_HEADS: keep[QUERY_HEADS].copy()}
        other[QUERY_HEADS][0] = [1, 1, 0, 1, 0, 1]
        assert cut(model, other).spec == pruned.spec
        assert np.abs(masked - np.asarray(forward(cut(model, other), TOKENS))).max() > 1e-2
        assert np.abs(masked - np.asarray(forward(model, TOKENS, masks(dict(list(keep.items())[:2]))))).max() > 1e-2


@pytest.mark.slow
def test_kept_query_heads_keep_their_weights():
    model = mixed_model()
    pruned, old = cut(model, keep_of(model)), model.segments[0].attention
    new = pruned.segments[0].attention
    np.testing.assert_array_equal(new.query[...][0, :, 0], old.query[...][0][:, 0, [1, 2]])
    np.testing.assert_array_equal(new.query[...][0, :, 1], old.query[...][0][:, 1, [0, 2]])
    np.testing.assert_array_equal(new.output[...][0, 1], old.output[...][0, 1, [0, 2]])
    np.testing.assert_array_equal(new.key[...][0], old.key[...][0])


def test_keeping_all_query_heads_changes_nothing():
    model = mixed_model()
    same = cut(model, existing_units(model.segments) | {QUERY_HEADS: existing_query_heads(model.segments)})
    jax.tree.map(np.testing.assert_array_equal, same, model)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 1, 0, 1, 0, 0], r"layer 0, .* got \[2, 1\]"),
        ([0, 0, 0, 0, 0, 0], r"at least one, .* got \[0, 0\]"),
        ([0, 0, 0, 1, 1, 0], r"got \[0, 2\] with KV heads \[0, 1\] kept"),
    ],
)
def test_groups_that_differ_are_refused(row, message):
    model = mixed_model()
    keep = keep_of(model)
    keep[QUERY_HEADS][0] = row
    with pytest.raises(ValueError, match=message) as error:
        cut(model, keep)
    assert "\n" not in str(error.value)


def test_query_heads_of_a_removed_kv_head_and_wrong_shapes_are_refused():
    model = mixed_model()
    keep = keep_of(model)
    keep[QUERY_HEADS][1] = [0, 1, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="none in the others, got"):
        cut(model, keep)
    keep[QUERY_HEADS] = keep[QUERY_HEADS][:, :5]
    with pytest.raises(ValueError, match=r"expected query_heads of shape \(5, 6\)"):
        cut(model, keep)
    with pytest.raises(ValueError, match=r"gates: expected query_heads of shape \[..., 5 layers, 6 units\]"):
        forward(model, TOKENS, masks(keep))
    keep = keep_of(model)
    keep[QUERY_HEADS][3, 0] = True
    with pytest.raises(ValueError, match="query_heads unit 0 of layer 3 does not exist"):
        cut(model, keep)


def test_save_and_load(tmp_path):
    model = mixed_model()
    keep = keep_of(model)
    pruned = cut(model, keep)
    save_model(pruned, tmp_path / "pruned", keep=keep)
    loaded = load_model(tmp_path / "pruned")
    assert loaded.spec == pruned.spec
    jax.tree.map(np.testing.assert_array_equal, loaded, pruned)
    for back in (load_keep(tmp_path / "pruned"), keep_from_json(keep_to_json(keep))):
        jax.tree.map(np.testing.assert_array_equal, back, keep)
    whole = {name: keep[name] for name in STRUCTURES}
    with pytest.raises(ValueError, match="expected query_heads units a layer"):
        save_model(pruned, tmp_path / "wrong", keep=whole | {QUERY_HEADS: existing_query_heads(model.segments)})
    assert QUERY_HEADS not in keep_from_json(keep_to_json(whole))


@pytest.mark.slow
def test_every_estimator_scores_layers_of_different_groups():
    """A model with other numbers of query heads in its layers scores as the masked one that it is a cut of."""
    model = mixed_model(((2, 3, 5), (2, 3, 5), (3, 1, 0)))  # `test_contract` has a layer without attention
    keep = existing_units(model.segments) | {QUERY_HEADS: existing_query_heads(model.segments)}
    keep[QUERY_HEADS][1] = [0, 1, 0, 0, 0, 1]
    pruned = calibrate(cut(model, keep), windows_of(), list(ESTIMATORS), batch_size=3)  # raises if not finite
    names = ["gate_taylor", "gate_taylor_signed", "gate_fisher", "wanda", "fluctuation", "block_influence"]
    masked, dense = (calibrate(model, windows_of(), names, keep=k, batch_size=3) for k in (keep, None))
    for name in names:  # the others see the weights of masked heads, or count coordinates
        for structure in STRUCTURES:
            want = masked.scores(name)[structure]
            np.testing.assert_allclose(pruned.scores(name)[structure], want, rtol=2e-4, atol=1e-6, err_msg=name)
        assert not np.allclose(dense.scores(name)["mlp"], masked.scores(name)["mlp"], rtol=1e-2, equal_nan=True)


@pytest.mark.slow
def test_statistics_at_query_head_gates():
    model = mixed_model(((2, 3, 5), (2, 3, 5)))
    keep = existing_units(model.segments) | {QUERY_HEADS: existing_query_heads(model.segments)}
    keep[QUERY_HEADS][0] = [0, 1, 1, 1, 0, 1]
    needs = frozenset({GATE_GRADIENT, GATE_HESSIAN})
    seen = observe(model, [tuple(windows_of())], needs, gates=masks(keep), curvature=Curvature(probes=1))
    assert set(seen.values[GATE_GRADIENT]) == set(STRUCTURES)
    dense = observe(model, [tuple(windows_of())], needs, curvature=Curvature(probes=1))
    assert np.abs(np.asarray(seen.losses - dense.losses)).max() > 1e-3


@pytest.mark.slow
def test_perplexity_and_candidates():
    model = mixed_model()
    keep = keep_of(model)
    masked = perplexity(model, windows_of(), keep, batch_size=3)
    assert masked == pytest.approx(perplexity(cut(model, keep), windows_of(), batch_size=3), rel=1e-5)
    assert masked != pytest.approx(perplexity(model, windows_of(), batch_size=3), rel=1e-3)
    whole = {name: keep[name] for name in STRUCTURES}
    (group,) = candidate_losses(model, [tuple(windows_of())], [keep, whole])
    assert group[0].perplexity == pytest.approx(masked, rel=1e-5)
    assert group[1].perplexity == pytest.approx(perplexity(model, windows_of(), whole, batch_size=3), rel=1e-5)
    assert group[1].perplexity != pytest.approx(masked, rel=1e-3)
