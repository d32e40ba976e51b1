"""How a model lies in a GGUF file: llama.cpp's names, its order of rotary rows, its frequency divisors."""

import re

import numpy as np
from jaxtyping import Float

from saap_jax.llama.files.families import FAMILIES
from saap_jax.llama.spec import RopeScaling

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the divisors of each rotary frequency, float32 `[head_dim / 2]`."""

SCALING_KEYS = {
    "factor": "saap.rope.factor",
    "low_freq_factor": "saap.rope.low_freq_factor",
    "high_freq_factor": "saap.rope.high_freq_factor",
    "original_max_positions": "saap.rope.original_context_length",
}
"""Setting of a llama3 scaling -> where our files keep it; llama.cpp needs the divisors alone."""

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_down.bias": "mlp.down_proj.bias",
}

_EXPERTS = {
    "ffn_gate_inp.weight": "mlp/router",
    "ffn_gate_exps.weight": "mlp/gate",
    "ffn_up_exps.weight": "mlp/up",
    "ffn_down_exps.weight": "mlp/down",
}
"""Of a mixture, instead of the matrices of an MLP -> the path of the parameter in a layer."""

ROUTER = "ffn_gate_inp.weight"

PERMUTED = ("llama", "deci")
"""Architectures whose rotary rows llama.cpp wants as pairs; those of the others stay as halves of each head."""

_TO_WHOLE = {theirs: ours for ours, theirs in _WHOLE.items()}


def hf_name(name: str, family: str = "llama") -> str | None:
    """Return the Hugging Face name of a tensor in a GGUF file; None if a model of the family has no such tensor.

    >>> hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    parts = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if parts is None:
        return _WHOLE.get(name)
    layer = _in_layer(family)
    return f"model.layers.{parts[1]}.{layer[parts[2]]}" if parts[2] in layer else None


def gguf_name(name: str, family: str = "llama") -> str:
    """Return the name in a GGUF file of a tensor with a Hugging Face name, in a model of a family.

    >>> gguf_name("model.layers.3.mlp.down_proj.bias")
    'blk.3.ffn_down.bias'
    """
    if name in _TO_WHOLE:
        return _TO_WHOLE[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{({theirs: ours for ours, theirs in _in_layer(family).items()})[rest]}"


def _in_layer(family: str) -> dict[str, str]:
    """Return the name in a layer of each tensor in a GGUF file -> the one in Hugging Face's."""
    names, traits = _LAYER | dict(FAMILIES[family].gguf.tensors), FAMILIES[family]
    if traits.mixture is None:
        return names
    names = {ours: theirs for ours, theirs in names.items() if not theirs.startswith("mlp.")}
    return names | {ours: f"{traits.mixture.names[path]}.weight" for ours, path in _EXPERTS.items()}


def experts_side(name: str, family: str) -> int | None:
    """Return along which axis of a tensor with a Hugging Face name the experts of a layer lie, as rows or columns.

    None where it is not one of all experts.

    >>> experts_side("model.layers.0.mlp.experts.down_proj.weight", "qwen3_moe")
    1
    """
    mixture = FAMILIES[family].mixture
    return None if mixture is None else mixture.sides.get(name.split(".", 3)[-1])


def expert_matrices(values: np.ndarray, experts: int, side: int) -> np.ndarray:
    """Return `[experts, outputs, inputs]`, as in GGUF, of experts that lie side by side in one matrix.

    >>> expert_matrices(np.array([[1, 2, 3, 4]]), 2, 1).tolist()
    [[[1, 2]], [[3, 4]]]
    """
    rows, columns = values.shape
    if side:
        return values.reshape(rows, experts, -1).swapaxes(0, 1)
    return values.reshape(experts, -1, columns)


def side_by_side(values: np.ndarray, side: int) -> np.ndarray:
    """Undo `expert_matrices`."""
    _, rows, columns = values.shape
    return values.swapaxes(0, 1).reshape(rows, -1) if side else values.reshape(-1, columns)


def permute(values: np.ndarray, heads: int, *, undo: bool = False) -> np.ndarray:
    """Reorder query or key rows `[heads * head_dim, embed]`: halves of each head -> rotary pairs side by side."""
    rows, columns = values.shape
    sides = (rows // heads // 2, 2) if undo else (2, rows // heads // 2)
    return values.reshape(heads, *sides, columns).swapaxes(1, 2).reshape(rows, columns)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Float[np.ndarray, "half"]:
    """Return what a llama3 scaling divides each rotary frequency by, float64 in [1, factor]."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return 1 / (smooth + (1 - smooth) / scaling.factor)
