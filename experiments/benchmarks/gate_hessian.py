"""What does a probe of the gate Hessian cost, in gradients? Alone, and in the chunks that the library uses.

    python experiments/benchmarks/gate_hessian.py [--examples 4] [--batch 4] [--repeats 3] [--remat dots]

A gradient is a pass for gate gradients alone, the cheapest there is. What one more probe costs is the difference of
passes that differ in nothing but the number of probes, and so is free of what they share. Numbers of probes that are
prime come one by one. Prints wall and CPU seconds (of all threads, which other processes disturb less), median of the
repeats, warm, the passes taking turns in one process, and the same in gradients. A product for an exact entry costs
what a probe does.
"""

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from pass_cost import take_turns

import saap_jax
from saap_jax.data.windows import pairs
from saap_jax.estimation.base import Curvature, Statistic
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import CHUNK, GATE_HESSIAN
from saap_jax.estimation.observe import observe

PRIMES = [n for n in range(CHUNK + 1, 100) if all(n % d for d in range(2, n))]
NUMBERS = {"alone": (PRIMES[0], PRIMES[2]), f"in chunks of {CHUNK}": (2 * CHUNK, 4 * CHUNK)}
"""Fewer and more probes. Two chunks at least, for a single one is no loop and can share work with the gradient."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("examples", 4), ("batch", 4), ("length", 128), ("repeats", 3)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    arguments = parser.parse_args()

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, arguments.examples, arguments.length, 0)
    batches = pairs(windows, arguments.batch)

    def passing(need: Statistic, probes: int = 1) -> Callable[[], object]:
        curvature = Curvature(probes=probes, attention="probes")
        return lambda: observe(model, batches, frozenset({need}), curvature=curvature, remat=arguments.remat).values

    jobs = {0: passing(GATE_GRADIENT)}
    jobs |= {number: passing(GATE_HESSIAN, number) for number in itertools.chain(*NUMBERS.values())}
    seconds = {number: np.median(turns[1:], axis=0) for number, turns in take_turns(jobs, arguments.repeats).items()}
    tokens = arguments.examples * arguments.length
    print(f"{tokens} tokens, batches of {arguments.batch} x {arguments.length}, remat={arguments.remat}")
    print(f"{'median of ' + str(arguments.repeats):<36}{'wall s':>10}{'CPU s':>10}{'gradients, wall (CPU)':>24}")
    for number, taken in seconds.items():
        print_row(f"pass with {number} probes" if number else "one gradient", taken, seconds[0])
    for how, (fewer, more) in NUMBERS.items():
        print_row(f"one more probe {how}", (seconds[more] - seconds[fewer]) / (more - fewer), seconds[0])


def print_row(name: str, taken: np.ndarray, gradient: np.ndarray) -> None:
    """Print seconds, and what they are in gradients."""
    wall, cpu = taken / gradient
    print(f"{name:<36}{taken[0]:10.2f}{taken[1]:10.2f}{f'{wall:.2f} ({cpu:.2f})':>24}")


if __name__ == "__main__":
    main()
