"""The form of a model's matrices in which a CPU decodes fastest: side by side, and shared out among its cores.

One token a row makes every product of a layer a matrix times a vector, whose time is that of reading the matrix; below
a few megabytes XLA gives it one core. Two things help. Query, key and value read the same normalised activations, and
so do gate and up, so each group is one product of a larger matrix. And a matrix whose inputs are split in as many parts
as there are cores is a batch of products, which XLA does give to all of them: a narrow (cut) layer is then read as fast
as a wide one. Measured by `experiments/benchmarks/matrix_vector.py`.
"""

import math
import os

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saap_jax.llama.decoding.cache import single_layers
from saap_jax.llama.model import Attention, Llama, Mlp, param
from saap_jax.llama.product import Matrix, product, sides


class Shared(Matrix):
    """A matrix in as many parts as there are cores, each for as many inputs; what does not divide is a part of its own.

    A product with one row of activations is a batch of one product a part; with more rows, for which that is slower, it
    is the ordinary one.
    """

    def __init__(self, axes: tuple[str, ...], value: Float[Array, "layers *sizes"], parts: int) -> None:
        self.axes = axes
        self.sizes = value.shape[1:]
        inputs, outputs = (math.prod(side) for side in sides(axes[1:], self.sizes))
        each = inputs // parts
        flat = value.reshape(value.shape[0], inputs, outputs)
        whole = flat[:, : each * parts].reshape(value.shape[0], parts, each, outputs)
        self.parts = param(("layers", "parts", "inputs", "outputs"), whole)
        self.rest = param(("layers", "inputs", "outputs"), flat[:, each * parts :])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.parts.shape[:-3], *self.sizes)

    def product(self, equation: str, x: Array) -> Array:
        batch, seq = x.shape[:2]
        parts, each, outputs = self.parts.shape
        flat = x.reshape(batch * seq, math.prod(x.shape[2:]))
        main, rest = jnp.split(flat, [parts * each], axis=-1)
        if batch * seq == 1:
            y = jnp.einsum("pi,pio->po", main.reshape(parts, each), self.parts[...]).sum(axis=0, keepdims=True)
        else:
            y = main @ self.parts[...].reshape(parts * each, outputs)
        if rest.size:
            y = y + rest @ self.rest[...]
        return y.reshape(batch, seq, *sides(self.axes[1:], self.sizes)[1])

    def dense(self) -> Array:
        layers = self.parts.shape[:-3]
        parts, each, outputs = self.parts.shape[-3:]
        flat = self.parts[...].reshape(*layers, parts * each, outputs)
        return jnp.concatenate([flat, self.rest[...]], axis=-2).reshape(self.shape)


class FusedAttention(Attention):
    """Attention whose query, key and value heads are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, attention: Attention, parts: int) -> None:
        layers, embed = attention.query.shape[:2]
        columns = [part[...].reshape(layers, embed, -1) for part in (attention.query, attention.key, attention.value)]
        self.inputs = Shared(("layers", "embed", "heads"), jnp.concatenate(columns, axis=-1), parts)
        for name in ("output", "output_bias", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm"):
            setattr(self, name, getattr(attention, name))

    def heads(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[
        Float[Array, "batch seq kv_heads q_per_kv head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
    ]:
        """Return queries, keys and values, as `Attention.heads`."""
        kv_heads, q_per_kv, head_dim, _ = self.output.shape
        columns = product("btd,df->btf", x, self.inputs)
        queries, own = kv_heads * q_per_kv * head_dim, kv_heads * head_dim
        query, key, value = jnp.split(columns, (queries, queries + own), axis=-1)
        single = (*x.shape[:2], kv_heads, head_dim)
        return query.reshape(*x.shape[:2], kv_heads, q_per_kv, head_dim), key.reshape(single), value.reshape(single)


class FusedMlp(Mlp):
    """Feed-forward block whose gate and up matrices are columns of one matrix, in that order, and nowhere else."""

    def __init__(self, mlp: Mlp, parts: int) -> None:
        columns = jnp.concatenate([mlp.gate[...], mlp.up[...]], axis=-1)
        self.inputs = Shared(("layers", "embed", "mlp"), columns, parts)
        self.down, self.down_bias, self.router = mlp.down, mlp.down_bias, None

    def halves(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[Float[Array, "batch seq mlp"], Float[Array, "batch seq mlp"]]:
        """Return what the gate and the up matrix make, as `Mlp.halves`."""
        gate, up = jnp.split(product("btd,df->btf", x, self.inputs), 2, axis=-1)
        return gate, up


def fused_layers(model: Llama, parts: int | None = None) -> Llama:
    """Return the same function for `prefill` and `decode_steps`: `single_layers`, their matrices fused and shared out.

    A matrix that is not plain (quantised, adapted) stays as it is, and so do those beside it that read the same. For
    decoding only: what reads matrices by name (pruning, saving, compensation) wants the model that this was made of.

    Args:
        model: dense or cut.
        parts: in how many parts inputs are split; None for the number of cores.
    """
    if all(isinstance(segment.attention, FusedAttention) for segment in model.segments):
        return model
    parts = parts or _cores()
    single = single_layers(model)
    graph, rest = nnx.split(single)
    fused = nnx.merge(graph, rest)
    for segment in fused.segments:
        if _plain(segment.attention.query, segment.attention.key, segment.attention.value):
            segment.attention = FusedAttention(segment.attention, parts)
        if segment.mlp.router is None and _plain(segment.mlp.gate, segment.mlp.up):
            segment.mlp = FusedMlp(segment.mlp, parts)
        for block, name in ((segment.attention, "output"), (segment.mlp, "down")):
            if _plain(matrix := getattr(block, name)):
                setattr(block, name, Shared(matrix.axes, matrix[...], parts))
    return fused


def _plain(*matrices: object) -> bool:
    return all(isinstance(matrix, nnx.Param) for matrix in matrices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
