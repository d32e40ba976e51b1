"""Σ_b G_b and Σ_b (s_b G_b)² of a matrix, G_b = Σ_t x_btᵀ dy_bt the gradient of example b: in plain JAX, and on TPU.

An example's gradient is as large as the matrix, and a batch of them may be larger than the model. Neither form ever
holds more than one. The plain one takes one example after the other. The TPU's is a Pallas kernel: a tile of the result
stays in vector memory while the examples pass by, so that no G_b is ever written to the memory of the chip.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from saap_jax.config.mesh import BATCH
from saap_jax.llama.model import at_least_float32
from saap_jax.runtime.constraints import batch_shards, sum_of_shards, unit_axes

TILE = (512, 512, 1024)
"""Largest tile of the kernel: tokens, inputs, outputs; with both results and two buffers each 14 MiB in bfloat16."""

ROWS = 16
"""What the tokens of a tile are a multiple of, as bfloat16 lies in memory."""

VMEM = 32 * 2**20
"""Bytes of vector memory that the kernel may take."""

Sums = tuple[Float[Array, "inputs outputs"], Float[Array, "inputs outputs"]]


def gradient_sums(
    x: Float[Array, "batch seq inputs"],
    cotangent: Float[Array, "batch seq outputs"],
    scale: Float[Array, "batch"],
    embed: int,
    axes: tuple[str, ...] = (),
) -> Sums:
    """Return Σ_b G_b, in the type of `x`, and Σ_b (s_b G_b)², float32 at least: by the kernel on TPU, else plainly.

    On a mesh each device takes its own examples; sums are exchanged once.

    Args:
        embed: which axis of the result is the residual width, along which weights are spread over devices.
        axes: logical axes of the matrix, which say what its units are spread over.
    """
    plain = functools.partial(one_by_one, embed=embed)
    if x.dtype == jnp.float64 or min(x.shape[-1], cotangent.shape[-1]) < ROWS:  # a bias, a tiny model
        return plain(x, cotangent, scale)
    return jax.lax.platform_dependent(
        x, cotangent, scale, tpu=functools.partial(_on_devices, embed=embed, axes=axes), default=plain
    )


def one_by_one(
    x: Float[Array, "batch seq inputs"],
    cotangent: Float[Array, "batch seq outputs"],
    scale: Float[Array, "batch"],
    embed: int,
) -> Sums:
    """Return the two sums, one example (of those of each device) after the other.

    On a CPU G_b stays in the cache, and the sum of all is the gradient, which needs no product of its own.
    """
    wide, shards = at_least_float32(x.dtype), batch_shards(len(x))

    def split(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(shards, len(array) // shards, *array.shape[1:]), 0, 1)

    def add(sums: tuple[Array, Array], example: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        inputs, outputs, weight = example
        each = jnp.einsum("sti,sto->sio", inputs, outputs, preferred_element_type=wide)
        return (sums[0] + each, sums[1] + jnp.square(each * weight[:, None, None])), None

    zeros = jnp.zeros((shards, x.shape[-1], cotangent.shape[-1]), wide)
    examples = split(x), split(cotangent), split(scale.astype(wide))
    (total, square), _ = jax.lax.scan(add, (zeros, zeros), examples)
    return _exchanged(total, square, embed, x.dtype)


def tiled(
    x: Float[Array, "batch seq inputs"],
    cotangent: Float[Array, "batch seq outputs"],
    scale: Float[Array, "batch"],
    *,
    tile: tuple[int, int, int] = TILE,
    interpret: bool = False,
) -> Sums:
    """Return the two sums by one Pallas kernel for TPU.

    Args:
        tile: the most tokens, inputs and outputs at once.
        interpret: run it anywhere, slowly, as the tests do.
    """
    from jax.experimental import pallas as pl  # here: elsewhere than on a TPU nothing needs it
    from jax.experimental.pallas import tpu as pltpu

    (batch, length, inputs), outputs = x.shape, cotangent.shape[-1]
    rows = min(tile[0], _up(length, ROWS))
    padding = [(0, 0), (0, -length % rows), (0, 0)]  # zeros add nothing; what a tile reads beyond the end might
    x, cotangent = jnp.pad(x, padding), jnp.pad(cotangent, padding)
    high, broad = (size if size <= most else most for size, most in zip((inputs, outputs), tile[1:], strict=True))
    steps = x.shape[1] // rows

    def kernel(scales: Any, some_x: Any, some_dy: Any, total: Any, square: Any, one: Any) -> None:
        example, step = pl.program_id(2), pl.program_id(3)

        @pl.when(step == 0)
        def _() -> None:
            one[...] = jnp.zeros_like(one)

        one[...] += jax.lax.dot_general(
            some_x[0], some_dy[0], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

        @pl.when(step == steps - 1)
        def _() -> None:
            gradient = one[...]
            squared = jnp.square(gradient * scales[example])

            @pl.when(example == 0)
            def _() -> None:
                total[...], square[...] = gradient, squared

            @pl.when(example > 0)
            def _() -> None:
                total[...] += gradient
                square[...] += squared

    result = pl.BlockSpec((high, broad), lambda i, o, b, t: (i, o))
    total, square = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(inputs, high), pl.cdiv(outputs, broad), batch, steps),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, rows, high), lambda i, o, b, t: (b, t, i)),
            pl.BlockSpec((1, rows, broad), lambda i, o, b, t: (b, t, o)),
        ],
        out_specs=[result, result],
        out_shape=[jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((high, broad), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * length * inputs * outputs,
            bytes_accessed=x.size * x.dtype.itemsize * pl.cdiv(outputs, broad)
            + cotangent.size * cotangent.dtype.itemsize * pl.cdiv(inputs, high)
            + 8 * inputs * outputs,
            transcendentals=0,
        ),
        interpret=interpret,
    )(scale.astype(jnp.float32), x, cotangent)
    return total, square


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _on_devices(
    x: Float[Array, "batch seq inputs"],
    cotangent: Float[Array, "batch seq outputs"],
    scale: Float[Array, "batch"],
    embed: int,
    axes: tuple[str, ...] = (),
    kernel: Callable[..., Sums] = tiled,
) -> Sums:
    """Run the kernel on every device of the mesh in force, on its own examples and units, and exchange the sums.

    The partitioner cannot split a kernel, so what lies where is said here: examples by the batch, the width of the
    units as `unit_axes` says, the residual width whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if math.prod(mesh.shape.values()) == 1:
        total, square = kernel(x, cotangent, scale)
        return total.astype(x.dtype), square
    sizes, widths = mesh.shape, (x.shape[-1], cotangent.shape[-1])
    batch = tuple(axis for axis in BATCH if sizes.get(axis, 1) > 1) if batch_shards(len(x)) > 1 else ()
    units: list[tuple[str, ...] | None] = [None, None]
    units[1 - embed] = unit_axes(axes, widths[1 - embed]) or None
    parts = (PartitionSpec(batch or None, None, units[0]), PartitionSpec(batch or None, None, units[1]))
    total, square = jax.shard_map(
        lambda *each: tuple(sums[None] for sums in kernel(*each)),
        in_specs=(*parts, PartitionSpec(batch or None)),
        out_specs=(PartitionSpec(batch or None, *units),) * 2,
        check_vma=False,
    )(x, cotangent, scale)
    return _exchanged(total, square, embed, x.dtype)


def _exchanged(total: Array, square: Array, embed: int, dtype: Any) -> Sums:
    """Add up the sums of the parts of a batch, those of gradients in the type that the model computes in."""
    return sum_of_shards(total.astype(dtype), embed), sum_of_shards(square, embed)
