"""Layers of different numbers of query heads a KV head, as exported models may have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import score_units
from saap_jax.data.windows import Windows
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.segments import existing_units, masks
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.structures.discovery import count_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.helpers import forward, length_mask, random_model, random_tokens

TOKENS = jnp.asarray(random_tokens(3, 7))
WIDTHS = ((2, 3, 5), (2, 3, 5), (1, 2, 4), (0, 3, 5), (3, 1, 0))
"""(kv_heads, q_per_kv, mlp) of each layer: runs of many kinds, a layer without attention, one without groups."""


def mixed_model(widths=WIDTHS, **options):
    layers = tuple(LayerWidths(kv_heads=k, q_per_kv=g, mlp=f) for k, g, f in widths)
    return random_model(LlamaSpec(vocab=24, embed=8, head_dim=4, layers=layers, tied=False), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 2e-5), (np.float64, 1e-10)])
def test_masked_equals_cut(dtype, atol, tmp_path):
    with jax.enable_x64(dtype == np.float64):
        model = mixed_model(dtype=dtype)
        keep = existing_units(model.segments)
        keep["attention"][1, 0] = keep["attention"][4, 1] = keep["mlp"][0, 1] = keep["mlp"][0, 3] = False
        masked, pruned = np.asarray(forward(model, TOKENS, masks(keep))), cut(model, keep)
        np.testing.assert_allclose(masked, forward(pruned, TOKENS), rtol=0, atol=atol)
        widths = [(w.kv_heads, w.q_per_kv, w.mlp) for w in pruned.spec.layers]
        assert widths == [(2, 3, 3), (1, 3, 5), (1, 2, 4), (0, 3, 5), (2, 1, 0)]
        assert count_parameters(pruned) == (subject := LlamaSubject(model)).parameters - subject.removed(keep)
        assert np.abs(masked - np.asarray(forward(model, TOKENS))).max() > 1e-2
    if dtype == np.float32:
        save_model(pruned, tmp_path / "pruned", keep=keep)
        loaded = load_model(tmp_path / "pruned")
        assert loaded.spec == pruned.spec
        jax.tree.map(np.testing.assert_array_equal, loaded, pruned)
        jax.tree.map(np.testing.assert_array_equal, load_keep(tmp_path / "pruned"), keep)


@pytest.mark.slow
def test_every_estimator_scores_layers_of_different_groups():
    """A layer with fewer query heads a KV head scores as one whose third query head writes nothing."""
    wide, narrow = mixed_model(((2, 3, 5), (2, 3, 5))), mixed_model(((2, 2, 5), (2, 3, 5)))
    silent = jnp.ones(wide.segments[0].attention.output.shape).at[0, :, 2].set(0)
    wide.segments[0].attention.output[...] = wide.segments[0].attention.output[...] * silent
    leaves = zip(jax.tree.leaves(wide.segments[0]), *(jax.tree.leaves(each) for each in narrow.segments), strict=True)
    parts = [[x[i : i + 1][tuple(map(slice, part.shape))] for i, part in enumerate(each)] for x, *each in leaves]
    for number in range(2):
        shape = jax.tree.structure(narrow.segments[number])
        narrow.segments[number] = jax.tree.unflatten(shape, [part[number] for part in parts])
    for name in ("embedding", "norm", "unembedding"):
        getattr(narrow, name)[...] = getattr(wide, name)[...]
    np.testing.assert_allclose(forward(narrow, TOKENS), forward(wide, TOKENS), rtol=0, atol=2e-5)
    windows = Windows(np.asarray(TOKENS), length_mask(7, 5, 6, seq=7))
    found = score_units(narrow, windows, list(ESTIMATORS), batch_size=3)  # raises if not finite
    names = ["gate_taylor", "gate_taylor_signed", "gate_fisher", "wanda", "fluctuation", "block_influence"]
    expected = score_units(wide, windows, names, batch_size=3)
    for name in names:  # the others see the weights of silent heads, or count coordinates
        for structure in STRUCTURES:
            want = expected.scores(name)[structure]
            np.testing.assert_allclose(found.scores(name)[structure], want, rtol=2e-4, atol=1e-6, err_msg=name)
