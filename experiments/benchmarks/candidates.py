"""What does one more candidate cost? Evaluation at the width that it keeps against a dense pass over the same text.

    python experiments/benchmarks/candidates.py [--candidates 16] [--ratios 0.2 0.5] [--windows 8] [--at-once 4]

Candidates remove a share of the parameters of all layers, other units and widths in each, from all layers (`none`) or
from those behind the first four, which are then run once a group. The dense pass runs in turn with each group, so that
drift of the machine hits both alike. Prints seconds a candidate and their ratio to the dense pass, wall and CPU,
medians over the groups, and the largest difference from masks one by one. Compiling is left out.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from pass_cost import clocks

import saap_jax
from saap_jax.evaluation.perplexity import GroupBatch, candidate_losses, candidates_step, loss_step, window_losses
from saap_jax.llama.segments import masks, ones_gates
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.types import Keep


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    for option, value in (("candidates", 16), ("windows", 8), ("length", 128), ("at-once", 4)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.evaluation_windows("builtin:reference", tokenizer, arguments.length, arguments.windows)
    batch = (np.asarray(windows.tokens), np.asarray(windows.mask))
    subject, ones = LlamaSubject(model), ones_gates(model.segments)

    def dense() -> np.ndarray:
        start = clocks()
        jax.block_until_ready(loss_step(model, *map(jnp.asarray, batch), ones))
        return clocks() - start

    list(candidate_losses(model, [batch], random_keeps(subject, 1, 0.5, 0), at_once=arguments.at_once))
    dense()  # compiled
    before = candidates_step._cache_size()
    print(f"{windows.tokens.size} tokens, groups of {arguments.at_once} candidates; seconds wall (CPU)")
    print(f"{'ratio':>10} {'whole':>10}{'a candidate':>18}{'dense pass':>18}{'of it':>14}")
    for whole, ratio in itertools.product((0, 4), arguments.ratios):
        keeps, own, base = random_keeps(subject, arguments.candidates, ratio, whole), [], []

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
        share = np.median(np.divide(own, base), axis=0)
        cells = "".join(f"{pair[0]:>10.3f} ({pair[1]:5.3f})" for pair in (each, forward))
        print(f"{ratio:>10} {whole or 'none':>10}{cells}{share[0]:>8.2f} ({share[1]:.2f})", flush=True)
    alone = window_losses(model, [batch], masks(keeps[0])).sums
    print(f"difference from masks one by one: {np.abs(found[0].sums / alone - 1).max():.1e} (relative)")
    print(f"programs compiled on the way: {candidates_step._cache_size() - before}")


def random_keeps(subject: LlamaSubject, count: int, ratio: float, whole: int) -> list[Keep]:
    """Make keep-sets without a share of the parameters of layers; each layer behind the first `whole` loses its own."""
    random, sizes = np.random.default_rng(0), {name: each.shape[1] for name, each in subject.existing.items()}
    layers, cost = len(subject.existing["mlp"]), {name: int(each[0]) for name, each in subject.costs.items()}
    found = []
    for _ in range(count):
        shares = np.where(np.arange(layers) < whole, 0, random.normal(0, 0.1, layers))
        shares[whole:] += (ratio * layers - shares.sum()) / (layers - whole)
        keep = {name: np.zeros_like(units) for name, units in subject.existing.items()}
        for layer, share in enumerate(shares):
            left = (1 - share) * sum(cost[name] * size for name, size in sizes.items())
            least = -(-(left - sizes["mlp"] * cost["mlp"]) // cost["attention"])
            heads = max(round(left / cost["attention"] * random.uniform(0.1, 0.4)), int(least), 0)
            heads = min(heads, sizes["attention"])
            channels = min(sizes["mlp"], round((left - heads * cost["attention"]) / cost["mlp"]))
            for name, kept in (("attention", heads), ("mlp", channels)):
                keep[name][layer, random.permutation(sizes[name])[:kept]] = True
        found.append(keep)
    return found


if __name__ == "__main__":
    main()
