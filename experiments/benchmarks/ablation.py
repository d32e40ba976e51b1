"""How fast is the oracle? Exact changes of the loss by `ablate` against re-running the whole model a unit.

    python experiments/benchmarks/ablation.py [--examples 2] [--length 128] [--layers 6] [--channels 4] [--at-once 4]

Takes all attention units and some MLP channels of layers spread evenly over the depth. After each batch of units the
whole model runs once for each of the same units, one gate closed, so that drift of the machine hits both alike. Prints
wall and CPU seconds a unit, their ratios and the largest difference of the two results; compiling and the one dense
pass, which all units share, are left out.
"""

import argparse
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from pass_cost import clocks

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.estimation.ablation import Group, Unit, ablate, sample_units
from saap_jax.evaluation.perplexity import loss_step
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units, ones_gates
from saap_jax.types import STRUCTURES


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("examples", 2), ("length", 128), ("layers", 6), ("channels", 4), ("at-once", 4)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, arguments.examples, arguments.length, 0)
    depth = len(model.spec.layers)
    layers = [int((i + 0.5) * depth / arguments.layers) for i in range(arguments.layers)]
    units = [u for u in sample_units(existing_units(model.segments), arguments.channels) if u.layer in layers]
    oracle = {name: np.zeros(2) for name in STRUCTURES}
    whole = {name: np.zeros(2) for name in STRUCTURES}
    losses: dict[Unit, float] = {}

    def take_turns(groups: Sequence[Group]) -> Iterator[Group]:
        for group in groups:
            start = clocks()
            yield group
            middle = clocks()
            losses.update({unit: loss_without(model, windows, unit) for unit in group})
            oracle[group[0].structure] += middle - start
            whole[group[0].structure] += clocks() - middle

    dense = loss_without(model, windows, None)
    ablate(model, [windows], [u for u in units if u.layer == layers[-1]], at_once=arguments.at_once)  # compiles
    changes = ablate(model, [windows], units, at_once=arguments.at_once, progress=take_turns)
    print(f"{windows.tokens.size} tokens, {len(units)} units of layers {', '.join(map(str, layers))}")
    print(f"{'seconds a unit, wall (CPU)':<28}{'oracle':>16}{'whole model':>16}{'ratio':>16}")
    for name in STRUCTURES:
        count = sum(unit.structure == name for unit in units)
        print_row(name, oracle[name] / count, whole[name] / count)
    print_row("all", sum(oracle.values()) / len(units), sum(whole.values()) / len(units))
    difference = max(abs(losses[unit] - dense - change) for unit, change in changes.items())
    print(f"changes from {min(changes.values()):.4f} to {max(changes.values()):.4f}, difference {difference:.1e}")


def print_row(name: str, oracle: np.ndarray, whole: np.ndarray) -> None:
    """Print seconds and their ratio."""
    cells = (f"{wall:.3f} ({cpu:.3f})" for wall, cpu in (oracle, whole, whole / oracle))
    print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells))


def loss_without(model: Llama, windows: Windows, unit: Unit | None) -> float:
    """Return the mean loss of the whole model with one gate closed (None: with all open)."""
    gates = ones_gates(model.segments)
    if unit is not None:
        gates[unit.structure] = gates[unit.structure].at[unit.layer, unit.number].set(0.0)
    sums, counts = loss_step(model, jnp.asarray(windows.tokens), jnp.asarray(windows.mask), gates)
    return float(np.asarray(sums, np.float64).sum() / np.asarray(counts).sum())


if __name__ == "__main__":
    main()
