"""A model as Tunix lays out its parameters: a second implementation of what `saap_jax.llama.files.tunix` reads."""

from typing import Any

import numpy as np

from saap_jax.llama import Llama


def arrays_of(model: Llama) -> dict[str, Any]:
    """Return the tree that Tunix keeps, a `value` below each name."""
    gemma = model.constants.family == "gemma3_text"
    word = "scale" if gemma else "w"
    tree: dict[str, Any] = {
        "embedder": {"input_embedding": _value(model.embedding[...])},
        "final_norm": {word: _value(model.norm[...])},
        "layers": {},
    }
    if model.unembedding is not None:
        tree["lm_head"] = {"w": _value(model.unembedding[...])}
    for segment in model.segments:
        for index in range(segment.length):
            layer = _gemma(segment, index) if gemma else _layer(segment, index)
            tree["layers"][str(len(tree["layers"]))] = layer
    return tree


def _value(array: Any) -> dict[str, np.ndarray]:
    return {"value": np.asarray(array)}


def _mlp(segment: Any, at: int) -> dict[str, Any]:
    return {f"{name}_proj": {"kernel": _value(getattr(segment.mlp, name)[...][at])} for name in ("gate", "up", "down")}


def _heads(array: np.ndarray) -> np.ndarray:
    """Join the axes of KV heads and of query heads a KV head."""
    return array.reshape(*array.shape[:-3], -1, array.shape[-1]) if array.ndim > 3 else array


def _layer(segment: Any, at: int) -> dict[str, Any]:
    own = segment.attention
    output = np.asarray(own.output[...][at])
    attention: dict[str, Any] = {
        "q_proj": {"w": _value(_heads(np.asarray(own.query[...][at])))},
        "k_proj": {"w": _value(own.key[...][at])},
        "v_proj": {"w": _value(own.value[...][at])},
        "o_proj": {"w": _value(output.reshape(-1, *output.shape[2:]))},
    }
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        if (bias := getattr(own, f"{name}_bias")) is not None:
            attention[f"{short}_bias"] = _value(np.asarray(bias[...][at]).ravel())
        if (norm := getattr(own, f"{name}_norm", None)) is not None:
            attention[f"{short}_norm"] = {"w": _value(norm[...][at])}
    return {
        "attn": attention,
        "mlp": _mlp(segment, at),
        "input_layernorm": {"w": _value(segment.attention_norm[...][at])},
        "post_attention_layernorm": {"w": _value(segment.mlp_norm[...][at])},
    }


def _gemma(segment: Any, at: int) -> dict[str, Any]:
    own = segment.attention
    query, output = _heads(np.asarray(own.query[...][at])), np.asarray(own.output[...][at])
    both = np.stack([np.asarray(own.key[...][at]), np.asarray(own.value[...][at])])
    return {
        "attn": {
            "q_einsum": {"w": _value(query.transpose(1, 0, 2))},
            "kv_einsum": {"w": _value(both.transpose(0, 2, 1, 3))},
            "attn_vec_einsum": {"w": _value(output.reshape(-1, *output.shape[2:]))},
            "_query_norm": {"scale": _value(own.query_norm[...][at])},
            "_key_norm": {"scale": _value(own.key_norm[...][at])},
        },
        "mlp": _mlp(segment, at),
        "pre_attention_norm": {"scale": _value(segment.attention_norm[...][at])},
        "post_attention_norm": {"scale": _value(segment.attention_post_norm[...][at])},
        "pre_ffw_norm": {"scale": _value(segment.mlp_norm[...][at])},
        "post_ffw_norm": {"scale": _value(segment.mlp_post_norm[...][at])},
    }
