"""How fast is the scoring pass? All eight estimators against one, and the floating-point rate against a large matmul.

    python experiments/benchmarks/scoring.py [--examples 16] [--batch 8] [--remat dots]

Prints seconds of the pass (median of the repeats, the variants taking turns in one process), their ratio, and the rate
in GFLOP/s with the share that it is of this machine's own float32 product of two 4096 x 4096 matrices. Operations are
counted as 6 x parameters x tokens (forward and backward of every matrix, the unembedding included) plus attention, and
nothing for what rematerialisation computes twice.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import saap_jax
from saap_jax.api import calibrate
from saap_jax.config import EstimationConfig
from saap_jax.llama.model import Llama


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    arguments = parser.parse_args()

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, arguments.examples, arguments.length, 0)
    variants: dict[str, tuple[str, ...]] = {
        "taylor_element alone": ("taylor_element",),
        "all eight": EstimationConfig().estimators,
        "gate_fisher alone": ("gate_fisher",),
        "wanda alone": ("wanda",),
    }
    matrix = jax.random.normal(jax.random.key(0), (4096, 4096))
    product = jax.jit(jnp.matmul)

    def score(names: tuple[str, ...]) -> Callable[[], object]:
        return lambda: calibrate(model, windows, names, batch_size=arguments.batch, remat=arguments.remat)

    jobs = {name: score(names) for name, names in variants.items()} | {"matmul": lambda: product(matrix, matrix)}
    seconds = take_turns(jobs, arguments.repeats)
    rate = 2 * 4096**3 / seconds["matmul"]
    tokens = arguments.examples * arguments.length
    print(f"{tokens} tokens, batches of {arguments.batch} x {arguments.length}, remat={arguments.remat}")
    print(f"{'4096 x 4096 matmul':<22}{seconds['matmul']:8.2f} s {rate / 1e9:8.1f} GFLOP/s")
    for name in variants:
        backward = name != "wanda alone"
        done = operations(model, arguments.length) * tokens * ((2 if name.startswith("gate") else 3) if backward else 1)
        share = done / seconds[name] / rate
        ratio = seconds[name] / seconds["taylor_element alone"]
        print(
            f"{name:<22}{seconds[name]:8.2f} s {done / seconds[name] / 1e9:8.1f} GFLOP/s = {share:.0%} of the matmul, "
            f"{ratio:.2f} x taylor_element"
        )


def operations(model: Llama, length: int) -> float:
    """Count the operations of one token's forward pass: two a parameter, and attention to every position."""
    spec = model.spec
    heads = sum(layer.kv_heads * layer.q_per_kv for layer in spec.layers)
    return 2.0 * saap_jax.count_parameters(model) + 4.0 * heads * spec.head_dim * length


def take_turns(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return each job's median seconds, warm; the jobs take turns, so that drift of the machine hits all alike."""
    for job in jobs.values():
        jax.block_until_ready(job())
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            jax.block_until_ready(job())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
