"""How fast are matrices read when one token passes through MLPs of a width? What bounds decoding of a cut model.

    python experiments/benchmarks/matrix_vector.py [--embed 576] [--widths 1536 683] [--megabytes 300]

Gate and up are one matrix, as when decoding on a CPU; as many layers as take the megabytes, so that they come from
memory. Prints the median time of a layer and bytes a second: of a width that XLA gives one core they are lower.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp


@jax.jit
def through(x: jax.Array, inputs: list[jax.Array], outputs: list[jax.Array]) -> jax.Array:
    """Return the residual stream behind all MLPs."""
    for both, down in zip(inputs, outputs, strict=True):
        gate, up = jnp.split(x @ both, 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ down
    return x


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed", type=int, default=576)
    parser.add_argument("--widths", type=int, nargs="+", default=[1536, 683])
    parser.add_argument("--megabytes", type=int, default=300)
    arguments = parser.parse_args()
    for width in arguments.widths:
        size = 4 * 3 * arguments.embed * width
        layers = max(1, round(1e6 * arguments.megabytes / size))
        inputs = [jnp.full((arguments.embed, 2 * width), 1e-3 + 1e-6 * n) for n in range(layers)]
        outputs = [jnp.full((width, arguments.embed), 1e-3 + 1e-6 * n) for n in range(layers)]
        x, times = jnp.ones((1, arguments.embed)), []
        for _ in range(31):
            start = time.perf_counter()
            jax.block_until_ready(through(x, inputs, outputs))
            times.append(time.perf_counter() - start)
        each = statistics.median(times[1:]) / layers
        print(f"width {width:>5}, {layers} layers: {1e6 * each:.0f} us a layer, {size / each / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
