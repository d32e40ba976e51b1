"""Parity with transformers (torch, float32): logits of each family both ways, and greedy text through its own cache."""

import itertools
import json
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.generate import Sampling, generate

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


def load_torch(directory, attention="sdpa"):
    """Load what we wrote, its own code if it has some: no key is missing, unexpected or read as a default."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attention, "trust_remote_code": True, "output_loading_info": True}
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


# --- LLaMA -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model():
    return runpy.run_path(str(Path(__file__).parent.parent / "goldens/make_llama_goldens.py"))["tiny_model"]


ROWS = jnp.asarray(np.random.default_rng(1).integers(0, 32, (3, 40)))
ROPES = ["default", "linear", "llama3"]


@pytest.mark.parametrize(
    ("heads", "tied", "rope"), list(itertools.product(["mha", "gqa", "mqa"], [True, False], ROPES))
)
def test_both_ways_of_llama(tiny_model, heads, tied, rope, tmp_path):
    theirs = tiny_model(heads, tied, rope)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    expected = torch_logits(theirs, ROWS)
    np.testing.assert_allclose(ours(ROWS), expected, rtol=0, atol=1e-5)
    assert np.abs(ours(ROWS[:, ::-1]) - expected).max() > 0.1
    if (heads, tied) == ("gqa", False):
        back = load_torch(save_model(ours, tmp_path / "ours"), "eager")
        np.testing.assert_allclose(ours(ROWS), torch_logits(back, ROWS), rtol=0, atol=1e-5)


# --- relatives -------------------------------------------------------------------------------------

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
SIZES |= {"pad_token_id": None}
WINDOWED = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5}
MIXED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
VARIANTS = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-window": ("qwen2", WINDOWED),
    "qwen2-head_dim": ("qwen2", {"head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-tied": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-window": ("qwen3", {"head_dim": 8} | WINDOWED),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7, "query_pre_attn_scalar": 10},
    ),
    "gemma3-untied": (
        "gemma3_text",
        {
            "head_dim": 6,
            "sliding_window": 5,
            "tie_word_embeddings": False,
            "num_key_value_heads": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3-alike": ("gemma3_text", {"head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "qwen3-some": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3_moe": ("qwen3_moe", MIXED | {"head_dim": 8, "norm_topk_prob": True}),
    "qwen3_moe-kept": ("qwen3_moe", MIXED | {"num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 9, "num_key_value_heads": 4}),
}
"""Name -> family, and what its config says beside `SIZES`."""


def tiny_relative(name: str):
    """Return a random float32 model of two layers, with biases and norm scales that are not what they begin with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, options = VARIANTS[name]
    config = AutoConfig.for_model(family, **SIZES | options, attn_implementation="eager")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape)
            tensor.copy_(1 + 0.2 * noise if key.endswith("norm.weight") else 0.25 * noise)
    return model


TOKENS = np.random.default_rng(1).integers(0, 32, (2, 24))


@pytest.mark.parametrize("name", VARIANTS)
def test_both_ways(name, tmp_path):
    theirs = tiny_relative(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    family, options = VARIANTS[name]
    assert ours.constants.family == family
    assert (ours.constants.apart or ours.constants).sliding_window == options.get("sliding_window")
    expected, got = torch_logits(theirs, TOKENS), np.asarray(ours(jnp.asarray(TOKENS)))
    near = 1e-4 if "gemma" in name else 2e-5  # norms behind the sub-blocks enlarge rounding
    np.testing.assert_allclose(got, expected, rtol=0, atol=near)
    assert np.abs(got - torch_logits(theirs, TOKENS[:, ::-1].copy())).max() > 0.1
    config = json.loads((save_model(ours, tmp_path / "ours") / "config.json").read_text())
    assert config["model_type"] == family
    back = load_torch(tmp_path / "ours", "eager")
    assert type(back) is type(theirs)
    np.testing.assert_allclose(torch_logits(back, TOKENS), got, rtol=0, atol=near)


# --- text ------------------------------------------------------------------------------------------

PROMPTS = ["The capital of France is", "Once upon a time, there was a little", "def add(a, b):\n    return", "1 + 1 ="]
NEW = 48


def test_text_of_a_real_model(smollm2, smollm2_tokenizer, tmp_path):
    """Ours in one batch with padding on the left, theirs one prompt at a time."""
    theirs = load_torch(save_model(smollm2, tmp_path / "model"), "eager")
    prompts = [smollm2_tokenizer.encode(text) for text in PROMPTS]
    ours = generate(smollm2, prompts, max_new_tokens=NEW, sampling=Sampling(stop_tokens=()))
    for prompt, made in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            whole = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
        assert made == whole[0, len(prompt) :].tolist()
    assert len({tuple(row) for row in ours}) == len(PROMPTS)
