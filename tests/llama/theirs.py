"""Tiny random models of each family, made by transformers. Needs torch."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
WINDOWED = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5}
VARIANTS = {
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-window": ("qwen2", WINDOWED),
    "qwen2-head_dim": ("qwen2", {"head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-tied": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-window": ("qwen3", {"head_dim": 8} | WINDOWED),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 9, "num_key_value_heads": 4}),
}
"""Name -> family, and what its config says beside `SIZES`."""


def tiny_model(name: str) -> torch.nn.Module:
    """Return a random float32 model of two layers, with biases and norm scales that are not what they begin with."""
    family, options = VARIANTS[name]
    options = {key: value for key, value in (SIZES | options).items() if (key, value) != ("head_dim", None)}
    config = AutoConfig.for_model(family, **options, attn_implementation="eager")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape)
            tensor.copy_(1 + 0.2 * noise if key.endswith("norm.weight") else 0.25 * noise)
    return model
