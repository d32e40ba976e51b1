"""Grouped queries without groups: the same function of tokens, each query head with a key and value of its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from saap_jax.llama.model import Llama, param


def ungrouped(model: Llama) -> Llama:
    """Return a model that computes the same, with the key and value of each KV head copied for each of its query heads.

    Its attention units are the query heads, in the order of `QUERY_HEADS`: whatever tells something of attention units
    (gates, statistics, estimators, the ablation oracle) tells it of query heads there. Takes
    2 · kv_heads · (q_per_kv - 1) · head_dim · embed parameters more a layer; the given model is left as it is.
    """
    new = jax.tree.map(lambda x: x, model)
    for segment in new.segments:
        attention, each = segment.attention, segment.widths.q_per_kv
        for name, parameter in vars(attention).items():
            if isinstance(parameter, nnx.Param) and "kv_heads" in parameter.axes:
                setattr(attention, name, param(parameter.axes, _by_query_head(parameter, each)))
    return new


def _by_query_head(parameter: nnx.Param, each: int) -> Array:
    """Return a parameter of attention with one KV head for each of the `each` query heads of a KV head."""
    value, axis = parameter[...], parameter.axes.index("kv_heads")
    if "q_per_kv" not in parameter.axes:
        return jnp.repeat(value, each, axis=axis)
    sizes = value.shape
    return value.reshape(*sizes[:axis], sizes[axis] * each, 1, *sizes[axis + 2 :])
