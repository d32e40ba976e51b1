"""Greedy continuations equal those of transformers' `generate` with its own cache (torch, float32), token for token."""

import numpy as np
import pytest

from saap_jax.llama import save_model
from saap_jax.llama.generate import generate

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")

PROMPTS = ["The capital of France is", "Once upon a time, there was a little", "def add(a, b):\n    return", "1 + 1 ="]
NEW = 48


def test_real_model(smollm2, smollm2_tokenizer, tmp_path):
    """Ours in one batch with padding on the left, theirs one prompt at a time."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(save_model(smollm2, tmp_path / "model"), dtype=torch.float32).eval()
    prompts = [smollm2_tokenizer.encode(text) for text in PROMPTS]
    ours = generate(smollm2, prompts, max_new_tokens=NEW, stop_tokens=())
    for prompt, made in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            whole = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
        assert made == whole[0, len(prompt) :].tolist()
    assert len({tuple(row) for row in ours}) == len(PROMPTS)


def test_cut_model(smollm2, tmp_path):
    """A model whose layers were all cut alike, which transformers can read."""
    from transformers import LlamaForCausalLM

    from saap_jax.llama.segments import existing_units
    from saap_jax.surgery.cut import cut

    keep = existing_units(smollm2.segments)
    keep["attention"][:, 1] = False
    keep["mlp"][:, ::3] = False
    pruned = cut(smollm2, keep)
    theirs = LlamaForCausalLM.from_pretrained(save_model(pruned, tmp_path / "model"), dtype=torch.float32).eval()
    prompt = np.random.default_rng(0).integers(0, 49152, 40).tolist()
    with torch.inference_mode():
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
        )
    assert generate(pruned, [prompt], max_new_tokens=24, stop_tokens=()) == [whole[0, 40:].tolist()]
