"""Quantise the matrices of a model in groups of inputs: which integers, which scale, which offset.

A group's weights become α·q + m with q in 0 … 2^b − 1; α and m are real numbers of the group and output (see
`saap_jax.llama.quantized` for how they are stored and multiplied).
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saap_jax.llama.generate import power_of_two
from saap_jax.llama.model import Llama
from saap_jax.llama.product import Weight, check_plain, inputs_and_outputs
from saap_jax.llama.quantized import MATRICES, PLANES, Quantized, pack, with_matrices
from saap_jax.llama.spec import LlamaSpec
from saap_jax.runtime.gather import fetched

Rounding = Literal["nearest", "search"]
"""How a group is rounded: to a grid from its least to its largest weight, or to the best of some narrower grids."""

SHRINK = 24
LEAST = 0.5
"""Grids that `search` tries, from the whole range of a group down to this share of it."""

_FEWEST = 2**8
_ROWS = 2**15
"""Groups that are quantised at once, a power of two: 4 MiB of floats with 32 weights each; few programs for all."""


def quantize(
    model: Llama,
    *,
    bits: int = 4,
    group_size: int = 32,
    matrices: tuple[str, ...] = tuple(MATRICES),
    rounding: Rounding = "search",
) -> Llama:
    """Quantise the named matrices of a model; embeddings, norms and biases stay as they are.

    Args:
        bits: 2, 3, 4 or 8 an integer.
        group_size: inputs that share a scale and an offset; the inputs of every matrix must be a multiple of it.
        rounding: `nearest` rounds to the nearest of 2^bits values spread over a group's range. `search` also tries
            narrower ranges, fits scale and offset to the integers by least squares, and takes what has the smallest
            squared error, so that it is never worse.

    Raises:
        ValueError: a width that is no multiple of the group size, or a model that is not in floats.
    """
    check_plain(model, "quantize")
    check_group_size(model.spec, bits, group_size, matrices)

    def one(weight: Weight) -> Weight:
        inputs, outputs = inputs_and_outputs(weight)
        arrays = [
            quantize_matrix(
                fetched(weight[...], layer).astype(np.float32).reshape(inputs, outputs), bits, group_size, rounding
            )
            for layer in range(weight.shape[0])
        ]
        packed, scale, offset = (jnp.asarray(np.stack(each)) for each in zip(*arrays, strict=True))
        return Quantized(weight.axes, tuple(weight.shape[1:]), bits, group_size, (packed, scale, offset))

    return with_matrices(model, one, matrices)


def quantize_matrix(
    weight: Float[np.ndarray, "inputs outputs"], bits: int, group_size: int, rounding: Rounding
) -> tuple[np.ndarray, Float[np.ndarray, "groups outputs"], Float[np.ndarray, "groups outputs"]]:
    """Compute packed integers `[groups, bytes, outputs]`, scales and offsets of one matrix of one layer."""
    inputs, outputs = weight.shape
    groups = inputs // group_size
    rows = np.ascontiguousarray(weight.reshape(groups, group_size, outputs).swapaxes(1, 2)).reshape(-1, group_size)
    integers, scale, offset = np.empty(rows.shape, np.uint8), *(np.empty(len(rows), np.float32) for _ in range(2))
    fit = {"nearest": nearest, "search": searched}[rounding]
    count = min(_ROWS, max(_FEWEST, power_of_two(len(rows))))
    for start in range(0, len(rows), count):
        piece = rows[start : start + count]
        padded = np.zeros((count, group_size), np.float32)
        padded[: len(piece)] = piece
        for into, found in zip((integers, scale, offset), fit(jnp.asarray(padded), 2**bits - 1), strict=True):
            into[start : start + count] = np.asarray(found)[: len(piece)]
    grouped = integers.reshape(groups, outputs, group_size).swapaxes(1, 2)
    return pack(grouped, bits), scale.reshape(groups, outputs), offset.reshape(groups, outputs)


Fitted = tuple[Int[Array, "rows group"], Float[Array, "rows"], Float[Array, "rows"]]
"""Integers, scale and offset of each group."""


@functools.partial(jax.jit, static_argnames="levels")
def nearest(rows: Float[Array, "rows group"], levels: int) -> Fitted:
    """Round each group to the nearest of the levels + 1 values from its least to its largest weight.

    α = (max − min)/levels, m = min, q = round((w − m)/α); a constant group has α = 0, q = 0 and is m exactly. So
    does one whose α is below the smallest normal float32 (1.2e-38), which XLA takes for 0.
    """
    low = jnp.min(rows, axis=1)
    high = jnp.max(rows, axis=1)
    return _on_grid(rows, low, (high - low) / levels, levels)


@functools.partial(jax.jit, static_argnames="levels")
def searched(rows: Float[Array, "rows group"], levels: int) -> Fitted:
    """Find the best of `nearest` and of `SHRINK` grids about the middle of the range, each refitted.

    The refit gives the integers of a grid the α and m that minimise Σ (w − αq − m)²: α = cov(q, w)/var(q),
    m = mean w − α·mean q.
    """
    low = jnp.min(rows, axis=1)
    high = jnp.max(rows, axis=1)

    def error(fitted: Fitted) -> Array:
        q, scale, offset = fitted
        return jnp.sum(jnp.square(q.astype(rows.dtype) * scale[:, None] + offset[:, None] - rows), axis=1)

    def better(index: Array, best: tuple[Fitted, Array]) -> tuple[Fitted, Array]:
        share = 1 - (1 - LEAST) * index.astype(rows.dtype) / (SHRINK - 1)
        cut = (1 - share) / 2 * (high - low)
        q = _on_grid(rows, low + cut, share * (high - low) / levels, levels)[0]
        real = q.astype(rows.dtype)
        middle = jnp.mean(real, axis=1)
        mean = jnp.mean(rows, axis=1)
        centred = real - middle[:, None]
        variance = jnp.sum(jnp.square(centred), axis=1)
        scale = jnp.sum(centred * rows, axis=1) / jnp.where(variance > 0, variance, 1)
        fitted = q, scale, mean - scale * middle
        wrong = error(fitted)
        less = wrong < best[1]
        q = jnp.where(less[:, None], fitted[0], best[0][0])
        scale, offset = (jnp.where(less, fitted[i], best[0][i]) for i in (1, 2))
        return (q, scale, offset), jnp.where(less, wrong, best[1])

    first = nearest(rows, levels)
    return jax.lax.fori_loop(0, SHRINK, better, (first, error(first)))[0]


def _on_grid(rows: Array, low: Array, scale: Array, levels: int) -> Fitted:
    divisor = jnp.where(scale > 0, scale, 1)
    q = jnp.clip(jnp.round((rows - low[:, None]) / divisor[:, None]), 0, levels)
    return q.astype(jnp.int32), scale, low


def check_no_experts(spec: LlamaSpec, matrices: tuple[str, ...]) -> None:
    """Raise ValueError for matrices of experts, of which each would have to have an adapter, or scales, of its own."""
    if spec.constants.traits.experts and (own := [name for name in matrices if MATRICES[name] == "mlp"]):
        raise ValueError(
            f"matrices: expected those of attention in a {spec.constants.family}, got {', '.join(own)} of its experts; "
            "give --method.matrices query key value output, or --method.name full"
        )


def check_group_size(spec: LlamaSpec, bits: int, group_size: int, matrices: tuple[str, ...] = tuple(MATRICES)) -> None:
    """Raise ValueError unless the matrices of a model with this spec can be quantised so, naming the widths that can.

    Needs no model: what a run would end with is known before it starts.
    """
    check_no_experts(spec, matrices)
    if bits not in PLANES:
        raise ValueError(f"bits: expected {', '.join(map(str, PLANES))}, got {bits}")
    unit = 8 // min(PLANES[bits])
    if group_size < 1 or group_size % unit:
        raise ValueError(f"group_size: expected a multiple of {unit}, so that {bits} bits fill bytes, got {group_size}")
    if spec.embed % group_size and set(matrices) - {"output", "down"}:
        raise ValueError(
            f"group_size: expected a divisor of the width of the residual stream, {spec.embed}, got {group_size}"
        )
    for layer, widths in enumerate(spec.layers):
        head = widths.q_per_kv * spec.head_dim
        for matrix, structure, units, each in (
            ("output", "attention", widths.kv_heads, head),
            ("down", "mlp", widths.mlp, 1),
        ):
            if matrix in matrices and units * each % group_size:
                raise ValueError(
                    f"group_size: layer {layer} has {units} x {each} inputs of {matrix}, no multiple of {group_size}; "
                    f"prune within(multiple_of={{{structure}: {math.lcm(group_size, each) // each}}}), leave "
                    f"{matrix} out of the matrices, or take plain adapters, --method.name lora"
                )
