"""Matrices that read the same activations, side by side as one: the form in which a CPU decodes fastest.

One token a row makes every product of a layer a matrix times a vector, whose time is that of reading the matrix; below
a few megabytes XLA gives it too few threads. Query, key and value read the same normalised activations, and so do gate
and up, so each group is one product of a larger matrix, and a narrow (cut) layer is read as fast as a wide one.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saap_jax.llama.cache import single_layers
from saap_jax.llama.model import Attention, Llama, Mlp, param


class FusedAttention(Attention):
    """Attention whose query, key and value heads are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, attention: Attention) -> None:
        layers, embed = attention.query.shape[:2]
        parts = [part[...].reshape(layers, embed, -1) for part in (attention.query, attention.key, attention.value)]
        self.inputs = param(("layers", "embed", "heads"), jnp.concatenate(parts, axis=-1))
        self.output, self.output_bias = attention.output, attention.output_bias

    def heads(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[
        Float[Array, "batch seq kv_heads q_per_kv head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
    ]:
        """Return queries, keys and values, as `Attention.heads`."""
        kv_heads, q_per_kv, head_dim, _ = self.output.shape
        columns = jnp.einsum("btd,df->btf", x, self.inputs[...])
        queries, own = kv_heads * q_per_kv * head_dim, kv_heads * head_dim
        query, key, value = jnp.split(columns, (queries, queries + own), axis=-1)
        single = (*x.shape[:2], kv_heads, head_dim)
        return query.reshape(*x.shape[:2], kv_heads, q_per_kv, head_dim), key.reshape(single), value.reshape(single)


class FusedMlp(Mlp):
    """Feed-forward block whose gate and up matrices are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, mlp: Mlp) -> None:
        self.inputs = param(("layers", "embed", "mlp"), jnp.concatenate([mlp.gate[...], mlp.up[...]], axis=-1))
        self.down, self.down_bias = mlp.down, mlp.down_bias

    def halves(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[Float[Array, "batch seq mlp"], Float[Array, "batch seq mlp"]]:
        """Return what the gate and the up matrix make, as `Mlp.halves`."""
        gate, up = jnp.split(jnp.einsum("btd,df->btf", x, self.inputs[...]), 2, axis=-1)
        return gate, up


def fused_layers(model: Llama) -> Llama:
    """Return the same function for `prefill` and `decode_steps`: `single_layers`, their matrices fused.

    A block with a matrix that is not plain (quantised, adapted) stays as it is. For decoding only: what reads matrices
    by name (pruning, saving, compensation) wants the model that this was made of.
    """
    if all(isinstance(run.attention, FusedAttention) for run in model.runs):
        return model
    single = single_layers(model)
    graph, rest = nnx.split(single)
    fused = nnx.merge(graph, rest)
    for run in fused.runs:
        if _plain(run.attention.query, run.attention.key, run.attention.value):
            run.attention = FusedAttention(run.attention)
        if _plain(run.mlp.gate, run.mlp.up):
            run.mlp = FusedMlp(run.mlp)
    return fused


def _plain(*matrices: object) -> bool:
    return all(isinstance(matrix, nnx.Param) for matrix in matrices)
