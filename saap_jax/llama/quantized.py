"""A group-quantised matrix: packed b-bit integers, a scale and an offset for each group of inputs and each output.

    W[i, o] = α[j, o] · (q[i, o] − β[j, o]) = α[j, o] · q[i, o] + m[j, o],    j = i // s the group of input i

What is stored is the offset m = −α·β instead of the zero point β, a real number: adding to m what an adapter learned is
exact, and so it is where a group is constant and α is 0. The inputs of a matrix are counted in the order of a stored
Hugging Face matrix's columns. Written by hand because the arrays of qwix refuse fractional zero points, which the merge
of an adapter needs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from saap_jax.llama.model import Llama, param
from saap_jax.llama.product import Matrix, Weight, inputs_and_outputs, sides

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of an integer -> how they are split into parts that fill a byte; the lowest bits first."""

CHUNK = 2**22
"""Weights that are in floats at once in a product, an array of 16 MiB; one group of inputs if that is more."""

FEW = 2
"""Rows up to which a product multiplies and adds in one pass over the bytes; more rows get a matrix in floats."""


Packed = UInt8[Array, "groups bytes outputs"]
Grouped = Float[Array, "groups outputs"]
Inputs = Float[Array, "batch seq inputs"]
Outputs = Float[Array, "batch seq outputs"]


class QuantizedArray(nnx.Variable):
    """An array of a quantised matrix: frozen, so no `nnx.Param`."""


class Quantization(NamedTuple):
    """How the matrices of a model are quantised."""

    bits: int
    group_size: int
    matrices: tuple[str, ...]
    """Which ones, in the order of `MATRICES`."""


_BLOCKS = {"attention": ("query", "key", "value", "output"), "mlp": ("gate", "up", "down")}
MATRICES = {name: block for block, names in _BLOCKS.items() for name in names}
"""Matrix of a layer -> the block that has it."""


class Quantized(Matrix):
    """A group-quantised matrix; `sizes` are those of its parameter without `layers`, which flattened arrays lost."""

    def __init__(
        self, axes: tuple[str, ...], sizes: tuple[int, ...], bits: int, group_size: int, arrays: tuple[Any, Any, Any]
    ) -> None:
        self.axes = axes
        self.sizes = sizes
        self.bits = bits
        self.group_size = group_size
        packed, scale, offset = arrays
        self.packed = QuantizedArray(packed, axes=("layers", "groups", "bytes", "outputs"))
        self.scale = QuantizedArray(scale, axes=("layers", "groups", "outputs"))
        self.offset = QuantizedArray(offset, axes=("layers", "groups", "outputs"))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scale.shape[:-2], *self.sizes)

    @property
    def zero(self) -> Float[Array, "*layers groups outputs"]:
        """Zero points β = −m/α; not finite where a group is constant."""
        return -self.offset[...] / self.scale[...]

    def product(self, equation: str, x: Array) -> Array:
        batch, seq = x.shape[:2]
        inputs, outputs = sides(self.axes[1:], self.sizes)
        flat = x.reshape(batch, seq, math.prod(inputs))
        if not flat.size:
            return jnp.zeros((batch, seq, *outputs), x.dtype)
        if batch * seq <= FEW and self.bits == 4:
            multiply = _few_rows
        else:
            multiply = _in_chunks
        y = multiply(flat, self.packed[...], self.scale[...], self.offset[...], self.bits)
        return y.reshape(batch, seq, *outputs)

    def dense(self) -> Array:
        value = dequantize(self.packed[...], self.scale[...], self.offset[...], self.bits)
        return value.reshape(self.shape)


def pack(integers: UInt8[np.ndarray, "*any group outputs"], bits: int) -> UInt8[np.ndarray, "*any bytes outputs"]:
    """Pack the integers of a group, below 2^bits, into bytes.

    Of a part of w bits (see `PLANES`), byte k holds those of the integers k, k + n, k + 2n, … of the n = s·w/8 bytes,
    the first in the lowest bits: at 4 bits the halves of a group, as in GGUF's Q4_1. The bytes of all parts follow each
    other, group_size · bits / 8 in all.

    >>> pack(np.arange(8, dtype=np.uint8)[:, None], 4)[:, 0].tolist()
    [64, 81, 98, 115]
    """
    size = integers.shape[-2]
    pieces = []
    shift = 0
    for width in PLANES[bits]:
        part = (integers >> shift) & (2**width - 1)
        shift += width
        count = 8 // width
        parts = part.reshape(*part.shape[:-2], count, size // count, part.shape[-1])
        shifted = parts << (width * np.arange(count, dtype=np.uint8))[:, None, None]
        pieces.append(np.bitwise_or.reduce(shifted, axis=-3))
    return np.concatenate(pieces, axis=-2)


def unpack(packed: UInt8[Array, "*any bytes outputs"], bits: int) -> UInt8[Array, "*any group outputs"]:
    """Undo `pack`."""
    size = packed.shape[-2] * 8 // bits
    value = None
    start = 0
    shift = 0
    for width in PLANES[bits]:
        rows = size * width // 8
        plane = packed[..., start : start + rows, :]
        parts = [(plane >> (width * i)) & (2**width - 1) for i in range(8 // width)]
        part = jnp.concatenate(parts, axis=-2) << shift
        value = part if value is None else value | part
        start = start + rows
        shift = shift + width
    assert value is not None
    return value


def dequantize(
    packed: UInt8[Array, "*layers groups bytes outputs"],
    scale: Float[Array, "*layers groups outputs"],
    offset: Float[Array, "*layers groups outputs"],
    bits: int,
) -> Float[Array, "*layers inputs outputs"]:
    """Return α·q + m."""
    value = unpack(packed, bits).astype(scale.dtype) * scale[..., None, :] + offset[..., None, :]
    return value.reshape(*value.shape[:-3], value.shape[-3] * value.shape[-2], value.shape[-1])


def _in_chunks(x: Inputs, packed: Packed, scale: Grouped, offset: Grouped, bits: int) -> Outputs:
    """Return x·W with as many groups in floats at once as `CHUNK` allows; the sum over chunks in float32."""
    groups, outputs = scale.shape
    size = x.shape[-1] // groups

    # The backward pass makes the floats anew: kept, those of all layers would be a copy of the model.
    @jax.checkpoint
    def partly(x: Array, packed: Array, scale: Array, offset: Array, first: Array) -> Array:
        return jnp.einsum("btd,df->btf", x, dequantize(_after(packed, first), scale, offset, bits).astype(x.dtype))

    counts = (n for n in range(1, groups) if groups % n == 0 and groups * size * outputs <= n * CHUNK)
    chunks = next(counts, groups)  # equal ones, the fewest of at most `CHUNK` weights, or of one group each
    if chunks == 1:
        return partly(x, packed, scale, offset, x[0, 0, 0])

    def step(total: Array, chunk: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        return total + partly(*chunk, x[0, 0, 0]).astype(total.dtype), None

    def split(array: Array) -> Array:
        return array.reshape(chunks, groups // chunks, *array.shape[1:])

    parts = jnp.moveaxis(x.reshape(*x.shape[:2], chunks, x.shape[-1] // chunks), 2, 0)
    chunked = (parts, split(packed), split(scale), split(offset))
    total, _ = jax.lax.scan(step, jnp.zeros((*x.shape[:2], outputs), scale.dtype), chunked)
    return total.astype(x.dtype)


def _after(packed: Packed, first: Float[Array, ""]) -> Packed:
    """Return the bytes as they are, made to depend on the `first` number of what they are multiplied by.

    What depends on parameters alone, XLA moves out of a loop of decoding, and to the beginning of a program of single
    layers: all matrices would be in floats at once. An optimisation barrier does not help, as it goes too early.
    """
    return packed ^ ((first != first) & (first == first)).astype(packed.dtype)  # never true, which XLA does not know


def _few_rows(x: Inputs, packed: Packed, scale: Grouped, offset: Grouped, bits: int) -> Outputs:
    """Return x·W = Σ_j α_j (x_j·q_j) + (Σ_i∈j x_i) m_j of 4 bits, as one reduction that XLA fuses: no floats stored."""
    groups, half, _ = packed.shape
    assert bits == 4, bits
    packed = _after(packed, x[0, 0, 0])
    parts = x.astype(scale.dtype).reshape(*x.shape[:2], groups, 2, half)
    low, high = ((p.astype(scale.dtype))[None, None] for p in (packed & 15, packed >> 4))
    products = parts[..., 0, :, None] * low + parts[..., 1, :, None] * high
    y = jnp.sum(products * scale[None, None, :, None], axis=(2, 3))
    return (y + jnp.einsum("btj,jo->bto", jnp.sum(parts, axis=(3, 4)), offset)).astype(x.dtype)


def quantization_of(model: Llama) -> Quantization | None:
    """Find the quantisation of a model; None if no matrix is quantised.

    Raises `ValueError` where its segments differ in that, or modules other than `Quantized` stand for matrices.
    """
    found = set()
    for segment in model.segments:
        matrices = {name: getattr(getattr(segment, block), name) for name, block in MATRICES.items()}
        stand_ins = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, Matrix)}
        if others := [name for name, matrix in stand_ins.items() if not isinstance(matrix, Quantized)]:
            kind = type(stand_ins[others[0]]).__name__
            raise ValueError(
                f"model: expected floats or quantised matrices, got {kind} for {others[0]}; merge it first"
            )
        kinds = {(matrix.bits, matrix.group_size) for matrix in stand_ins.values() if isinstance(matrix, Quantized)}
        found |= {(*kind, tuple(stand_ins)) for kind in kinds} or {(0, 0, ())}
    if len(found) > 1:
        raise ValueError(
            f"model: expected matrices that are all quantised alike, got (bits, group size, which) {found}"
        )
    bits, group_size, names = found.pop()
    if names:
        return Quantization(bits, group_size, names)
    return None


def dequantized(model: Llama) -> Llama:
    """Return the model in floats, of the dtype of its embedding; a model without quantised matrices as it is."""

    def to_floats(matrix: Weight) -> Weight:
        if not isinstance(matrix, Quantized):
            return matrix
        return param(matrix.axes, matrix.dense().astype(model.embedding.dtype))

    if quantization_of(model) is None:
        return model
    return with_matrices(model, to_floats)


def with_matrices(
    model: Llama, function: Callable[[Weight], Weight], matrices: tuple[str, ...] = tuple(MATRICES)
) -> Llama:
    """Put `function(matrix)` in the place of each of the named matrices, segment by segment."""
    new = jax.tree.map(lambda leaf: leaf, model)
    for segment in new.segments:
        for name in matrices:
            block = getattr(segment, MATRICES[name])
            setattr(block, name, function(getattr(block, name)))
    return new


def abstract_quantized(model: Llama, quantization: Quantization, where: str) -> Llama:
    """Return an abstract model with quantised matrices in the place of those named.

    Raises `ValueError`, naming `where` that was said, if a matrix has no whole number of groups.
    """
    bits, group_size, names = quantization

    def one(weight: Weight) -> Weight:
        inputs, outputs = inputs_and_outputs(weight)
        if inputs % group_size:
            raise ValueError(
                f"{where}: expected a group_size that divides the inputs of matrices, {inputs}, got {group_size}"
            )
        groups = (weight.shape[0], inputs // group_size)
        packed = jax.ShapeDtypeStruct((*groups, group_size * bits // 8, outputs), jnp.uint8)
        scale, offset = (jax.ShapeDtypeStruct((*groups, outputs), jnp.float32) for _ in range(2))
        return Quantized(weight.axes, tuple(weight.shape[1:]), bits, group_size, (packed, scale, offset))

    return with_matrices(model, one, names)
