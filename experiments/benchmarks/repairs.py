"""What do repairs and learning cost? In forward passes with the loss over the same text, taking turns with them.

    python experiments/benchmarks/repairs.py [--windows 32 128 512] [--batch 8] [--length 128] [--ratio 0.5]
        [--repeats 3] [--first 4]

`least_squares` on the model as pruned so far, with units drawn at random, as many in each layer: the first time, which
compiles, and with warm programs; beside it a third of its three passes at full width, without sums and solutions. Then
a step of `learn` and of `scales` over one microbatch, which is the gradient of the divergence by gates, with all layers
differentiated and with those from `--first` on; and the divergence of a keep-set, as held-out text is judged. Prints
wall and CPU seconds (of all threads, which other processes disturb less), medians, and ratios of medians.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from pass_cost import take_turns

import saap_jax
from saap_jax.data.windows import pairs
from saap_jax.estimation.base import Batch
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.surgery.compensation import advance_step, compensate, sub_blocks
from saap_jax.surgery.divergence import Divergence
from saap_jax.types import Keep

FORWARD = "forward pass"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="*", default=[32, 128, 512])
    for option, value in (("batch", 8), ("length", 128), ("repeats", 3), ("first", 4)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--ratio", type=float, default=0.5)
    arguments = parser.parse_args()
    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    keep = drawn(existing_units(model.segments), arguments.ratio)

    def text(windows: int) -> list[Batch]:
        drawn = saap_jax.calibration_windows("builtin:reference", tokenizer, windows, arguments.length, 0)
        return pairs(drawn, arguments.batch)

    gates = {name: units.astype(np.float64) for name, units in keep.items()}
    some = text(4 * arguments.batch)
    whole, behind = Divergence(model, some), Divergence(model, some, first=arguments.first)
    jobs: dict[str, Callable[[], object]] = {FORWARD: lambda: window_losses(model, some[:1])}
    jobs |= {f"step behind layer {at.first}": lambda at=at: at.gradient(gates, 0) for at in (whole, behind)}
    jobs["divergence"] = lambda: whole.value(gates, 0)
    show(f"a microbatch of {arguments.batch} x {arguments.length}", take_turns(jobs, arguments.repeats))
    for windows in arguments.windows:
        batches = text(windows)
        jobs = {
            FORWARD: lambda batches=batches: window_losses(model, batches),
            "least_squares": lambda batches=batches: compensate(model, keep, batches, LeastSquares()),
            "three passes": lambda batches=batches: three_passes(model, keep, batches),
        }
        show(f"{windows} windows of {arguments.length}", take_turns(jobs, arguments.repeats))


def drawn(existing: Keep, ratio: float) -> Keep:
    """Draw the units that stay, as many in each layer."""
    random = np.random.default_rng(0)
    keep = {name: np.zeros_like(units) for name, units in existing.items()}
    for name, units in existing.items():
        for layer, row in enumerate(units):
            there = np.flatnonzero(row)
            keep[name][layer, random.permutation(there)[: max(round(len(there) * (1 - ratio)), 1)]] = True
    return keep


def three_passes(model: Llama, keep: Keep, batches: list[Batch]) -> list[jax.Array]:
    """Run each sub-block three times at full width, of which least squares reads one pass."""
    streams = [model.embedded(jnp.asarray(tokens)) for tokens, _ in batches]
    for at in sub_blocks(model, keep):
        for _ in range(3):
            after = [advance_step(model, at.place, at.old, stream) for stream in streams]
        streams = after
    return streams


def show(text: str, times: dict[str, np.ndarray]) -> None:
    """Print a row a job, cold and warm."""
    base = np.median(times[FORWARD][1:], axis=0)
    print(f"{text:<28}{'cold s (CPU)':>20}{'warm s (CPU)':>20}{'forward passes, warm':>24}{'cold':>20}", flush=True)
    for name, turns in times.items():
        warm = np.median(turns[1:], axis=0)
        cells = turns[0], warm, warm / base, turns[0] / base
        print(
            f"{name:<28}"
            + "".join(f"{f'{w:.2f} ({c:.2f})':>{size}}" for (w, c), size in zip(cells, (20, 20, 24, 20), strict=True))
        )


if __name__ == "__main__":
    main()
