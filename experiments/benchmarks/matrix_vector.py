"""How fast are matrices read when one token passes through MLPs of a width? What bounds decoding of cut models.

    python experiments/benchmarks/matrix_vector.py [--embed 576] [--widths 1536 683] [--parts 2] [--megabytes 300]

Gate and up are one matrix, as when decoding on a CPU; as many layers as take the megabytes, so that they come from
memory. Each width is timed with whole matrices and with matrices in parts (`llama.decoder.Shared`), in turns. Prints
the median time of a layer and bytes a second: of a whole matrix that XLA gives one core they are lower.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from saap_jax.evaluation.cost import median_seconds
from saap_jax.llama.decoder import Shared
from saap_jax.llama.product import product

Mlps = list[tuple[Shared, Shared]]


@jax.jit
def through(x: jax.Array, mlps: Mlps) -> jax.Array:
    """Return the residual stream behind all MLPs."""
    for inputs, down in mlps:
        gate, up = jnp.split(product("btd,df->btf", x, inputs), 2, axis=-1)
        x = x + product("btf,fd->btd", jax.nn.silu(gate) * up, down)
    return x


def mlps_of(embed: int, width: int, layers: int, parts: int) -> Mlps:
    """Return that many MLPs, each with arrays of its own, without a `layers` axis."""

    def shared(axes: tuple[str, ...], shape: tuple[int, ...], value: float) -> Shared:
        return jax.tree.map(lambda leaf: leaf[0], Shared(axes, jnp.full((1, *shape), value), parts))

    return [
        (
            shared(("layers", "embed", "mlp"), (embed, 2 * width), 1e-3 + 1e-6 * layer),
            shared(("layers", "mlp", "embed"), (width, embed), 1e-3 + 1e-6 * layer),
        )
        for layer in range(layers)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed", type=int, default=576)
    parser.add_argument("--widths", type=int, nargs="+", default=[1536, 683])
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=300)
    arguments = parser.parse_args()
    for width in arguments.widths:
        size = 4 * 3 * arguments.embed * width
        layers = max(1, round(1e6 * arguments.megabytes / size))
        forms = {parts: mlps_of(arguments.embed, width, layers, parts) for parts in (1, arguments.parts)}
        x = jnp.ones((1, 1, arguments.embed))
        times = median_seconds([functools.partial(through, x, mlps) for mlps in forms.values()], 30)
        for parts, seconds in zip(forms, times, strict=True):
            each = seconds / layers
            print(f"width {width:>5}, {parts} parts: {1e6 * each:.0f} us a layer, {size / each / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
