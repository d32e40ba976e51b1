"""Logits equal what transformers computed when `tests/goldens/make_llama_goldens.py` ran; needs no torch."""

import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from saap_jax.llama import load_model

VARIANTS = [
    "-".join(parts)
    for parts in itertools.product(["mha", "gqa", "mqa"], ["tied", "untied"], ["default", "linear", "llama3"])
]


@pytest.fixture(scope="module")
def goldens():
    with safe_open(Path(__file__).parent.parent / "goldens/llama_goldens.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, json.loads(file.metadata()["configs"])


def load_tiny(goldens, variant, directory, **config):
    tensors, configs = goldens
    heads, tied, _ = variant.split("-")
    prefix = f"tiny/{heads}/"
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if tied == "tied":
        del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(json.loads(configs[variant]) | config))
    return load_model(directory)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny(goldens, variant, tmp_path):
    model = load_tiny(goldens, variant, tmp_path)
    logits = model(jnp.asarray(goldens[0]["tiny/tokens"]))
    np.testing.assert_allclose(logits, goldens[0][f"tiny/{variant}/logits"], rtol=0, atol=1e-5)


def test_variants_differ(goldens):
    """Negative control: each variant's logits are far from every other's with the same heads."""
    for heads in ("mha", "gqa", "mqa"):
        group = [goldens[0][f"tiny/{variant}/logits"] for variant in VARIANTS if variant.startswith(heads)]
        for one, other in itertools.combinations(group, 2):
            assert np.abs(one - other).max() > 1e-2


def test_norm_epsilon_matters(goldens, tmp_path):
    """Negative control: a constant read wrongly is seen at the tolerance."""
    model = load_tiny(goldens, "gqa-untied-default", tmp_path, rms_norm_eps=1e-3)
    logits = model(jnp.asarray(goldens[0]["tiny/tokens"]))
    assert np.abs(logits - goldens[0]["tiny/gqa-untied-default/logits"]).max() > 1e-4


@pytest.mark.slow
def test_bfloat16_is_close(goldens, tmp_path):
    load_tiny(goldens, "gqa-untied-llama3", tmp_path)
    model = load_model(tmp_path, "bfloat16")
    assert model.embedding.dtype == jnp.bfloat16
    logits, expected = model(jnp.asarray(goldens[0]["tiny/tokens"])), goldens[0]["tiny/gqa-untied-llama3/logits"]
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.05


@pytest.mark.slow
def test_real(goldens, smollm2):
    logits = np.asarray(smollm2(jnp.asarray(goldens[0]["real/tokens"]))[0])
    np.testing.assert_array_equal(logits.argmax(-1), goldens[0]["real/argmax"])
    np.testing.assert_allclose(logits.max(-1), goldens[0]["real/max"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(logits[:, ::512], goldens[0]["real/every_512th"], rtol=0, atol=5e-4)
    assert np.abs(logits[:, 1::512] - goldens[0]["real/every_512th"]).max() > 1  # negative control: other tokens
