"""Logits equal those of transformers' LlamaForCausalLM (torch, float32, eager attention)."""

import itertools
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama import LayerWidths, LlamaSpec, load_model, random_llama, save_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny_model():
    return runpy.run_path(str(Path(__file__).parent.parent / "goldens/make_llama_goldens.py"))["tiny_model"]


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def load_torch(directory):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 32, (3, 40)))


@pytest.mark.parametrize(
    ("heads", "tied", "rope"),
    list(itertools.product(["mha", "gqa", "mqa"], [True, False], ["default", "linear", "llama3"])),
)
def test_their_checkpoint(tiny_model, heads, tied, rope, tmp_path):
    theirs = tiny_model(heads, tied, rope)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    expected = torch_logits(theirs, TOKENS)
    np.testing.assert_allclose(ours(TOKENS), expected, rtol=0, atol=1e-5)
    assert np.abs(ours(TOKENS[:, ::-1]) - expected).max() > 0.1


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_our_directory(tiny_model, rope, tmp_path):
    """What we save, transformers reads: no key is missing, unexpected or read as a default."""
    tiny_model("gqa", False, rope).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    theirs = load_torch(save_model(ours, tmp_path / "ours"))
    np.testing.assert_allclose(ours(TOKENS), torch_logits(theirs, TOKENS), rtol=0, atol=1e-5)


def test_transformers_refuses_per_layer_widths(tmp_path):
    import jax
    from transformers import AutoModelForCausalLM

    layers = (LayerWidths(kv_heads=2, q_per_kv=2, mlp=8), LayerWidths(kv_heads=1, q_per_kv=2, mlp=8))
    spec = LlamaSpec(vocab=32, embed=16, head_dim=4, layers=layers, tied=True)
    directory = save_model(random_llama(spec, jax.random.key(0)), tmp_path / "cut")
    with pytest.raises(ValueError, match="saap_llama"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_real_model(smollm2, smollm2_tokenizer, tmp_path):
    text = "Rivers carry water from the mountains to the sea. In 1912, after 40 days of rain, this one did not stop."
    tokens = jnp.asarray([smollm2_tokenizer.encode(text)])
    expected = torch_logits(load_torch(save_model(smollm2, tmp_path / "model")), tokens)
    logits = np.asarray(smollm2(tokens))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
