"""Is the compile time of the scoring step flat in depth? Small width, all eight estimators' statistics.

    python experiments/benchmarks/compile_time.py

Prints seconds of lowering and compiling at 4, 8, 16 and 32 layers (median of the repeats, the depths taking turns) and
the ratio to 4 layers.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from saap_jax.config.jobs import USUAL
from saap_jax.estimation.base import Curvature, Plan
from saap_jax.estimation.observe import observe_step, union_of_needs
from saap_jax.estimation.registry import make_estimators
from saap_jax.evaluation.cost import in_turns
from saap_jax.llama.model import random_llama
from saap_jax.llama.segments import ones_gates
from saap_jax.llama.spec import LayerWidths, LlamaSpec

DEPTHS = (4, 8, 16, 32)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    seconds = in_turns([functools.partial(compile_seconds, depth) for depth in DEPTHS], repeats)
    medians = dict(zip(DEPTHS, map(statistics.median, seconds), strict=True))
    for depth, median in medians.items():
        print(f"{depth:3d} layers {median:6.2f} s  {median / medians[DEPTHS[0]]:.2f} x {DEPTHS[0]} layers")


def compile_seconds(depth: int) -> float:
    """Return the seconds that lowering and compiling the scoring step takes, without jax's caches."""
    widths = LayerWidths(kv_heads=2, q_per_kv=2, mlp=64)
    spec = LlamaSpec(vocab=256, embed=32, head_dim=8, layers=(widths,) * depth, tied=True)
    model = random_llama(spec, jax.random.key(0))
    needs = union_of_needs(make_estimators(USUAL).values())
    state = {need: need.init(model, Plan(2, Curvature())) for need in sorted(needs)}
    batch = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), bool), jnp.zeros((), jnp.int32)
    jax.clear_caches()
    start = time.perf_counter()
    observe_step.lower(model, state, jnp.zeros(2), batch, ones_gates(model.segments), remat="dots").compile()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
