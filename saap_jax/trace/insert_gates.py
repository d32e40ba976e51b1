"""A gate on every unit of a traced program, without a change to the model's code.

`gated(traced)` is the program with each structure's activations multiplied by gates where its units act: the model in
its dense and masked states, for estimators that differentiate the loss by gates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.trace.interpret import Changes, Placed, Tap, evaluate
from saap_jax.trace.trace import Traced, TracedStructure

StructureGates = dict[str, Float[Array, "*_copied _units"]]
"""Gates of traced structures by name: one for each unit of each copy (of each layer of a scan, each expert)."""


def all_ones(structures: Sequence[TracedStructure], dtype: Any = jnp.float32) -> StructureGates:
    """Return the gates of the dense model."""
    return {structure.name: jnp.ones((*structure.copied, structure.units), dtype) for structure in structures}


def gated(traced: Traced) -> Callable[..., Any]:
    """Return `function(gates, params, *inputs)`, which is the traced function but for the gates.

    `gates` names the structures that have them; the inputs have the shapes that were traced. A size that the traced
    program holds as a number (the divisor of a mean, the scale of attention scores) stays that of the dense model.

    Raises:
        ValueError: a name that is no prunable structure of the program, or gates of another shape.
    """
    run = tapped(traced, ())
    return lambda gates, params, *inputs: run(gates, params, *inputs)[0]


def tapped(traced: Traced, taps: Sequence[Tap]) -> Callable[..., tuple[Any, dict[Tap, Array]]]:
    """Return `gated(traced)` with a second result: the values of some operands, behind gates, as `Changes` takes them.

    Raises:
        ValueError: as `gated`.
    """
    prunable = {structure.name: structure for structure in traced.prunable}
    tree = jax.tree.structure(traced.results)

    def function(gates: StructureGates, params: Any, *inputs: Any) -> tuple[Any, dict[Tap, Array]]:
        placed: Placed = []
        for name, values in gates.items():
            if name not in prunable:
                raise ValueError(f"gates: expected names of prunable structures {sorted(prunable)}, got {name}")
            structure = prunable[name]
            if values.shape != (*structure.copied, structure.units):
                shape = (*structure.copied, structure.units)
                raise ValueError(f"gates of {name}: expected shape {shape}, got {values.shape}")
            placed += [(gate, gate.along, values) for gate in (*structure.gates, *structure.statistics)]
        flat = jax.tree.leaves((params, inputs))
        changes = Changes(placed, taps=tuple(taps))
        results = evaluate(traced.program.jaxpr, traced.program.consts, flat, (), changes)
        return jax.tree.unflatten(tree, results), changes.found

    return function
