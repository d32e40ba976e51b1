"""Layers at the width that gates keep: the same as masked, the same as cut, at the cost of the cut model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.model import Llama
from saap_jax.llama.passes import fits_kept_width, run_layers
from saap_jax.llama.segments import existing_units, masks
from saap_jax.surgery.cut import cut
from tests.helpers import RELATIVES, dense_model, ragged_model, random_keep, random_tokens, relative

TOKENS = jnp.asarray(random_tokens(3, 7))
NONE_OF_ONE = {"attention": [[True, False], [False, False]], "mlp": [[False] * 20, [True] * 9 + [False] * 11]}
FAMILIES = [family for family in RELATIVES if not RELATIVES[family].traits.experts]
OTHERS = [family for family in FAMILIES if family != "gemma3_text"]


@jax.jit
def hidden_at_kept_width(model: Llama, tokens: jax.Array, gates: dict[str, jax.Array]) -> jax.Array:
    """Compute the last hidden states of all layers at the width that the gates keep."""
    x = run_layers(model, model.embedded(tokens), 0, len(model.spec.layers), gates, kept_width=True)
    return model.final(x)


@pytest.mark.parametrize(
    "name", ["biases", "ragged", "gemma3_text", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)]
)
def test_masked_equals_kept_width_equals_cut(name, x64):
    wide = {"dtype": np.float64}
    if name in RELATIVES:
        model = relative(name, (2, 9), (2, 9), (1, 4), **wide)
    else:
        model = ragged_model(**wide) if name == "ragged" else dense_model(mlp=21, output_biases=True, **wide)
    for share in (0.0, 0.3, 0.7, 1.0):
        keep = random_keep(existing_units(model.segments), share, seed=5)
        found = hidden_at_kept_width(model, TOKENS, masks(keep))
        np.testing.assert_allclose(found, model.hidden(TOKENS, masks(keep))[0], rtol=1e-9)
        np.testing.assert_allclose(found, cut(model, keep).hidden(TOKENS)[0], rtol=1e-9)
        assert np.allclose(found, model.hidden(TOKENS)[0], rtol=1e-2) == (share == 1)


def test_a_layer_may_lose_all_units_and_gates_may_be_fractions(x64):
    model = dense_model(mlp=20, dtype=np.float64)
    gates = {name: jnp.asarray(kept, jnp.float64) * 0.3 for name, kept in NONE_OF_ONE.items()}
    found = hidden_at_kept_width(model, TOKENS, gates)
    np.testing.assert_allclose(found, model.hidden(TOKENS, gates)[0], rtol=1e-9)


def test_half_precision_stays_as_near_as_masks():
    wide, narrow = dense_model(mlp=20), dense_model(mlp=20, dtype=jnp.bfloat16)
    keep = random_keep(existing_units(wide.segments), 0.5, seed=1)
    exact = wide.hidden(TOKENS, masks(keep))[0]
    found, masked = hidden_at_kept_width(narrow, TOKENS, masks(keep)), narrow.hidden(TOKENS, masks(keep))[0]
    assert found.dtype == jnp.bfloat16
    errors = [float(jnp.abs(each.astype(jnp.float32) - exact).mean()) for each in (found, masked)]
    assert 0 < errors[0] < 1.5 * errors[1]


def test_what_is_removed_is_not_computed():
    """Operations follow the width: with weights of NaN in all removed units nothing is NaN, unless one is in a part."""
    model = dense_model(mlp=16)
    kept = np.arange(16) < 4
    keep = {"attention": existing_units(model.segments)["attention"], "mlp": np.stack([kept, kept])}
    spoiled = jax.tree.map(lambda x: x, model)
    spoiled.segments[0].mlp.up.set_value(jnp.where(kept, model.segments[0].mlp.up[...], jnp.nan))
    assert np.isfinite(hidden_at_kept_width(spoiled, TOKENS, masks(keep))).all()
    assert np.isnan(spoiled.hidden(TOKENS, masks(keep))[0]).any(), "masks compute them"


def test_models_that_have_no_width_to_keep():
    assert fits_kept_width(dense_model())
    for family in RELATIVES:
        assert fits_kept_width(relative(family)) == (family in FAMILIES)
