"""The ways to recover a pruned model: all parameters, or low-rank adapters beside frozen matrices, in floats (LoRA) or
quantised (QA-LoRA), and how they merge.

Sources: LoRA (arXiv:2106.09685); QA-LoRA (arXiv:2309.14717), whose pooling is a mean here, and whose zero points are
kept as offsets (see `saap_jax.llama.quantized`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from saap_jax.llama.model import Llama, param
from saap_jax.llama.product import Matrix, Weight, inputs_and_outputs, product
from saap_jax.llama.quantized import MATRICES, Quantized, quantization_of, with_matrices
from saap_jax.recovery.quantization import Rounding, check_no_experts, quantize


class AdapterParam(nnx.Variable):
    """A trained array of an adapter; no `nnx.Param`, so that a filter for parameters does not take it."""


class Adapted(Matrix):
    """A frozen matrix and its adapter: y = x·W + (η/r)·x·A·B, or with groups pool(x) for the second x.

    pool(x)_j is the mean of x over group j of `group_size` inputs, flattened in their order.
    """

    def __init__(self, base: Weight, a: Array, b: Array, factor: float, group_size: int | None) -> None:
        self.axes: tuple[str, ...] = base.axes
        self.base = base
        self.a = AdapterParam(a, axes=("layers", "inputs" if group_size is None else "groups", "rank"))
        self.b = AdapterParam(b, axes=("layers", "rank", "outputs"))
        self.factor = factor
        """η/r."""
        self.group_size = group_size

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def product(self, equation: str, x: Array) -> Array:
        y = product(equation, x, self.base)
        batch, seq = x.shape[:2]
        a = self.a[...].astype(x.dtype)
        b = self.b[...].astype(x.dtype)
        seen = x.reshape(batch, seq, math.prod(x.shape[2:]))
        if self.group_size is not None:
            seen = jnp.mean(seen.reshape(batch, seq, a.shape[0], self.group_size), axis=-1)
        added = jnp.einsum("btr,ro->bto", jnp.einsum("btj,jr->btr", seen, a), b)
        return y + self.factor * added.reshape(y.shape)

    def dense(self) -> Array:
        """W + (η/r)·A·B, of which each input of a group has a share 1/s."""
        base = self.base[...]
        change = self.factor * jnp.einsum("...jr,...ro->...jo", self.a[...], self.b[...])
        if self.group_size is not None:
            change = jnp.repeat(change / self.group_size, self.group_size, axis=-2)
        return base + change.reshape(self.shape).astype(base.dtype)


def adapted(
    model: Llama,
    key: Array,
    *,
    rank: int,
    scale: float,
    matrices: tuple[str, ...],
    group_size: int | None = None,
) -> Llama:
    """Put an adapter beside each named matrix, which computes what the given one does: B is zero.

    A is uniform in ±1/√n, n the numbers that the adapter sees of an input, as in LoRA's own code; float32 both.

    Raises:
        ValueError: matrices of experts, adapters that are there already, or a quantised matrix with other groups, whose
            zero points could not take the adapter.
    """
    check_no_experts(model.spec, matrices)
    every = [getattr(getattr(segment, MATRICES[name]), name) for segment in model.segments for name in matrices]
    if any(isinstance(matrix, Adapted) for matrix in every):
        raise ValueError("model: expected one without adapters, got one that has them; merge them first")
    for size in {matrix.group_size for matrix in every if isinstance(matrix, Quantized)} - {group_size}:
        raise ValueError(
            f"model: expected adapters over groups of {size} inputs beside matrices that are quantised in those, got "
            f"{group_size or 1}; dequantise it first (`dequantized`)"
        )
    shapes = [(each.shape[0], inputs_and_outputs(each)[0] // (group_size or 1), rank) for each in every]
    # One draw, cut up on the host: a draw for each shape would compile a program for each.
    flat = np.asarray(jax.random.uniform(key, (sum(map(math.prod, shapes)),), jnp.float32, -1.0, 1.0))
    pieces = iter(zip(shapes, np.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1]), strict=True))

    def adapt(matrix: Weight) -> Weight:
        shape, numbers = next(pieces)
        a = numbers.reshape(shape) * np.float32(max(shape[1], 1) ** -0.5)
        b = np.zeros((matrix.shape[0], rank, inputs_and_outputs(matrix)[1]), np.float32)
        return Adapted(matrix, jnp.asarray(a), jnp.asarray(b), scale / rank, group_size)

    return with_matrices(model, adapt, matrices)


@jax.jit  # one program for all matrices, where each by itself would compile several
def merged(model: Llama) -> Llama:
    """Take the adapters into the model, which then computes the same; matrices in floats take W + (η/r)·A·B.

    A quantised matrix takes what a group's adapter adds into its offset, m' = m + (η/r)(A·B)/s, which is
    β' = β − (η/r)(A·B)/(s·α): the integers, the scales and the size stay as they are.
    """

    def merge(matrix: Weight) -> Weight:
        if not isinstance(matrix, Adapted):
            return matrix
        base = matrix.base
        if not isinstance(base, Quantized):
            return param(matrix.axes, matrix.dense())
        change = matrix.factor / base.group_size * jnp.einsum("ljr,lro->ljo", matrix.a[...], matrix.b[...])
        arrays = (base.packed[...], base.scale[...], base.offset[...] + change)
        return Quantized(base.axes, base.sizes, base.bits, base.group_size, arrays)

    return with_matrices(model, merge)


# --- methods -------------------------------------------------------------------------------------

ALL = tuple(MATRICES)
"""Matrices that have adapters unless others are named."""


class Method(NamedTuple):
    """A way to recover: pure functions between models, and the type of the variables that an optimiser changes."""

    name: str
    prepare: Callable[[Llama, Array], Llama]
    """(model, typed key) -> the model to train, which computes what the given one does (quantised: nearly)."""
    trainable: type[nnx.Variable]
    """`nnx.split(model, trainable, ...)` separates what is trained from what is not."""
    merge: Callable[[Llama], Llama]
    """Trained model -> one without adapters that computes the same."""


def full() -> Method:
    """Train every parameter of a model in floats."""

    def prepare(model: Llama, key: Array) -> Llama:
        if quantization_of(model) is not None:
            raise ValueError(
                "model: expected floats, since all are trained, got quantised matrices; dequantise it first "
                "(`dequantized`)"
            )
        return model

    return Method("full", prepare, nnx.Param, lambda model: model)


def lora(*, rank: int = 8, scale: float = 16.0, matrices: tuple[str, ...] = ALL) -> Method:
    """Train adapters beside matrices in floats, which stay: y = x·W + (η/r)·x·A·B; merged, W + (η/r)·A·B.

    Args:
        rank: r, the width of A and B.
        scale: η.
        matrices: names of `MATRICES`.
    """
    _check_adapters(rank, scale, matrices)
    prepare = functools.partial(adapted, rank=rank, scale=scale, matrices=matrices)
    return Method("lora", prepare, AdapterParam, merged)


def groupwise(
    *,
    bits: int = 4,
    group_size: int = 32,
    rank: int = 8,
    scale: float = 16.0,
    matrices: tuple[str, ...] = ALL,
    rounding: Rounding = "search",
) -> Method:
    """Quantise, and train adapters that see one number a group: y = x·α(q − β) + (η/r)·pool(x)·A·B (QA-LoRA).

    pool is the mean over each group, so the adapter adds the same to all weights of a group, (η/r)(A·B)/s, which the
    zero points take: β' = β − (η/r)(A·B)/(s·α). The merged model has no adapter, and the size of the quantised one.

    Args:
        bits: 2, 3, 4 or 8 an integer.
        group_size: s, inputs that share a scale and a zero point.
        rank: r, the width of A and B.
        scale: η.
        matrices: names of `MATRICES`, which are quantised and have adapters.
        rounding: see `quantize`.
    """
    _check_adapters(rank, scale, matrices)

    def prepare(model: Llama, key: Array) -> Llama:
        quantised = quantize(model, bits=bits, group_size=group_size, matrices=matrices, rounding=rounding)
        return adapted(quantised, key, rank=rank, scale=scale, matrices=matrices, group_size=group_size)

    return Method("groupwise", prepare, AdapterParam, merged)


def _check_adapters(rank: int, scale: float, matrices: tuple[str, ...]) -> None:
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if not matrices or len(set(matrices)) < len(matrices) or not set(matrices) <= MATRICES.keys():
        raise ValueError(f"matrices: expected some of {', '.join(MATRICES)}, each once, got {', '.join(matrices)!r}")


METHODS: dict[str, Callable[..., Method]] = {"full": full, "lora": lora, "groupwise": groupwise}
"""Name -> factory with keyword-only hyper-parameters."""
