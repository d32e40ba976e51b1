"""Grouped queries without groups: the same function of tokens, each query head with a key and value of its own."""

import jax
import jax.numpy as jnp

from saap_jax.llama.model import Llama, param


def ungrouped(model: Llama) -> Llama:
    """Return a model that computes the same, with the key and value of each KV head copied for each of its query heads.

    Its attention units are the query heads, in the order of `QUERY_HEADS`: whatever tells something of attention units
    (gates, statistics, estimators, the ablation oracle) tells it of query heads there. Takes
    2 · kv_heads · (q_per_kv - 1) · head_dim · embed parameters more a layer; the given model is left as it is.
    """
    new = jax.tree.map(lambda x: x, model)
    for run in new.runs:
        attention, each = run.attention, run.widths.q_per_kv
        query, output = attention.query[...], attention.output[...]
        layers, embed, kv_heads, _, head_dim = query.shape
        heads = kv_heads * each
        attention.query = param(attention.query.axes, query.reshape(layers, embed, heads, 1, head_dim))
        attention.output = param(attention.output.axes, output.reshape(layers, heads, 1, head_dim, embed))
        attention.key = param(attention.key.axes, jnp.repeat(attention.key[...], each, axis=2))
        attention.value = param(attention.value.axes, jnp.repeat(attention.value[...], each, axis=2))
    return new
