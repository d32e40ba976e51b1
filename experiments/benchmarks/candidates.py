"""What does one more candidate cost? Batched masked evaluation against a dense forward pass over the same tokens.

    python experiments/benchmarks/candidates.py [--candidates 8 32 128] [--windows 8] [--length 128] [--at-once 8]

Candidates prune all layers at random (`none`), or leave the first four layers whole (`4 layers`), which are then run
once a batch. The dense pass runs in turn with each batch of candidates, so that drift of the machine hits both alike.
Prints seconds a candidate and their ratio to the dense pass, wall and CPU, medians over the batches, and the largest
difference from evaluating candidates one by one. Compiling is left out.
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import saap_jax
from saap_jax.evaluation.perplexity import GroupBatch, candidate_losses, candidates_step, loss_step, window_losses
from saap_jax.llama.segments import existing_units, masks, ones_gates
from saap_jax.types import STRUCTURES, Keep


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 32, 128])
    for option, value in (("windows", 8), ("length", 128), ("at-once", 8)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.evaluation_windows("builtin:reference", tokenizer, arguments.length, arguments.windows)
    batch = (np.asarray(windows.tokens), np.asarray(windows.mask))
    existing, ones = existing_units(model.segments), ones_gates(model.segments)

    def dense() -> np.ndarray:
        start = clocks()
        jax.block_until_ready(loss_step(model, *map(jnp.asarray, batch), ones))
        return clocks() - start

    list(candidate_losses(model, [batch], random_keeps(existing, arguments.at_once, 0), at_once=arguments.at_once))
    dense()  # compiled
    before = candidates_step._cache_size()
    print(f"{windows.tokens.size} tokens, batches of {arguments.at_once} candidates; seconds wall (CPU)")
    print(f"{'candidates':>10} {'whole':>10}{'a candidate':>18}{'dense pass':>18}{'ratio':>14}")
    for whole in (0, 4):
        for count in arguments.candidates:
            keeps, own, base = random_keeps(existing, count, whole), [], []

            def take_turns(steps: Sequence[GroupBatch], own: list = own, base: list = base) -> Iterator[GroupBatch]:
                for step in steps:
                    base.append(dense())
                    start = clocks()
                    yield step
                    own.append((clocks() - start) / len(step.group.members))

            found = {}
            for part in candidate_losses(model, [batch], keeps, at_once=arguments.at_once, progress=take_turns):
                found |= part
            each, forward = np.median(own, axis=0), np.median(base, axis=0)
            ratio = np.median(np.divide(own, base), axis=0)
            cells = "".join(f"{pair[0]:>10.3f} ({pair[1]:5.3f})" for pair in (each, forward))
            print(f"{count:>10} {whole or 'none':>10}{cells}{ratio[0]:>8.2f} ({ratio[1]:.2f})")
    alone = window_losses(model, [batch], masks(keeps[0])).sums
    print(f"difference from one by one: {np.abs(found[0].sums / alone - 1).max():.1e} (relative)")
    print(f"programs compiled on the way: {candidates_step._cache_size() - before}")


def random_keeps(existing: Keep, count: int, whole: int) -> list[Keep]:
    """Return keep-sets that remove a random half of each unit behind the first `whole` layers."""
    random = np.random.default_rng(0)
    layers = np.arange(len(existing[STRUCTURES[0]]))[:, None]
    return [
        {name: units & ((random.random(units.shape) < 0.5) | (layers < whole)) for name, units in existing.items()}
        for _ in range(count)
    ]


def clocks() -> np.ndarray:
    """Return wall seconds and CPU seconds of all threads, which other processes disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main()
