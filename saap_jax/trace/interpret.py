"""Evaluate a traced program equation by equation, with changes: operands multiplied by gates, other sizes, taps.

`gated(traced)` is the model in its dense and masked states, without a change to its code: the traced program with each
structure's activations multiplied by gates where its units act. Equations without a change inside are bound as they
are; calls that hold one are inlined, so a custom derivative of such a call is that of its program, and
`jax.checkpoint` is put around it anew.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float

from saap_jax.trace.jaxpr import CALLS, called_program, dtype_of, opened, scan_split
from saap_jax.trace.trace import Gate, Traced, TracedStructure

Path = tuple[int, ...]
"""Where an equation stands: see `Gate.equation`."""

Placed = list[tuple[Gate, tuple[Any, ...], Array]]
"""Gates, what the axes of each one's values run along (`Gate.along`, less the scans around), and the values."""

Tap = tuple[Path, int]
"""An equation and one of its operands, the values of which are wanted."""

Resize = Callable[[Path, JaxprEqn, Sequence[Any]], dict[str, Any]]
"""Makes the parameters of an equation for operands of other shapes."""

StructureGates = dict[str, Float[Array, "*_copied _units"]]
"""Gates of traced structures by name: one for each unit of each copy (of each layer of a scan, each expert)."""


def all_ones(structures: Sequence[TracedStructure], dtype: Any = jnp.float32) -> StructureGates:
    """Make the gates of the dense model."""
    return {structure.name: jnp.ones((*structure.copied, structure.units), dtype) for structure in structures}


def gated(traced: Traced) -> Callable[..., Any]:
    """Make `function(gates, params, *inputs)`, which is the traced function but for the gates.

    `gates` names the structures that have them; the inputs have the shapes that were traced. A size that the traced
    program holds as a number (the divisor of a mean, the scale of attention scores) stays that of the dense model.

    Raises:
        ValueError: a name that is no prunable structure of the program, or gates of another shape.
    """
    run = tapped(traced, ())
    return lambda gates, params, *inputs: run(gates, params, *inputs)[0]


def tapped(traced: Traced, taps: Sequence[Tap]) -> Callable[..., tuple[Any, dict[Tap, Array]]]:
    """Make `gated(traced)` with a second result: the values of some operands, behind gates, as `Changes` takes them."""
    prunable = {structure.name: structure for structure in traced.prunable}
    tree = jax.tree.structure(traced.results)

    def function(gates: StructureGates, params: Any, *inputs: Any) -> tuple[Any, dict[Tap, Array]]:
        placed: Placed = []
        for name, values in gates.items():
            if name not in prunable:
                raise ValueError(f"gates: expected names of prunable structures {sorted(prunable)}, got {name}")
            structure = prunable[name]
            if values.shape != (shape := (*structure.copied, structure.units)):
                raise ValueError(f"gates of {name}: expected shape {shape}, got {values.shape}")
            placed += [(gate, gate.along, values) for gate in (*structure.gates, *structure.statistics)]
        changes = Changes(placed, taps=tuple(taps))
        results = evaluate(*opened(traced.program), jax.tree.leaves((params, inputs)), (), changes)
        return jax.tree.unflatten(tree, results), changes.found

    return function


@dataclasses.dataclass(frozen=True)
class Changes:
    """How the evaluation of a program differs from the program."""

    gates: Placed
    resize: Resize | None = None
    taps: Sequence[Tap] = ()
    """Operands of equations that lie in no branch or `while` loop."""
    found: dict[Tap, Array] = dataclasses.field(default_factory=dict)
    """Gets their values, behind gates; within scans, the turns come first."""

    def inside(self, path: Path) -> "Changes":
        """Choose the changes at or below a place."""
        below = [each for each in self.gates if each[0].equation[: len(path)] == path]
        return dataclasses.replace(self, gates=below, taps=[tap for tap in self.taps if tap[0][: len(path)] == path])

    def alone(self, gates: Placed) -> "Changes":
        """Take gates of another trace, and a place of their own for values that are found."""
        return dataclasses.replace(self, gates=gates, found={})


def evaluate(jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any], path: Path, changes: Changes) -> list[Any]:
    """Evaluate a program, or one inside it at `path`, with changes that all lie in it.

    A literal may be a Python number: it becomes an array, for what is asked for its shape.
    """
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, dtype_of(atom)) if isinstance(atom, Literal) else known[atom]

    places = [gate.equation for gate, _, _ in changes.gates] + [equation for equation, _ in changes.taps]
    busy, idle = {place[len(path)] for place in places}, dataclasses.replace(changes, gates=[], taps=())
    for number, eqn in enumerate(jaxpr.eqns):
        here, values = (*path, number), [read(atom) for atom in eqn.invars]
        inside = changes.inside(here) if number in busy else idle
        for gate, along, gate_values in inside.gates:
            if gate.equation == here:
                values[gate.operand] = multiply(values[gate.operand], gate, along, gate_values)
        changes.found.update({tap: values[tap[1]] for tap in inside.taps if tap[0] == here})
        nested = _NESTED.get(eqn.primitive.name)
        if nested and (changes.resize or any(place != here for place in places if place[len(path)] == number)):
            results = nested(eqn, values, here, inside)
        else:
            parameters = eqn.primitive.get_bind_params(eqn.params)
            if changes.resize:
                parameters = changes.resize(here, eqn, values)
            results = eqn.primitive.bind(*values, **parameters)
            results = results if eqn.primitive.multiple_results else [results]
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def units_along(gate: Gate, size: int, units: int) -> list[np.ndarray]:
    """Tell which unit each index of an axis belongs to, `units` where none; again where an index belongs to two."""
    layers = [np.full(size, units)]
    for place in gate.places:
        own = [place.indices(unit) for unit in range(units)]
        if (layers[-1][np.concatenate(own)] != units).any():
            layers.append(np.full(size, units))
        for unit, indices in enumerate(own):
            layers[-1][indices] = unit
    return layers


def multiply(operand: Array, gate: Gate, along: tuple[Any, ...], values: Array) -> Array:
    """Multiply an operand by the gates of its units; indices that belong to no unit stay as they are.

    A unit whose gate is 0 is 0 afterwards even if it was infinite, as it may be behind a statistic that it has no part
    in. Where the gate has a neutral value, the operand gets that where the gate is 0, and stays as it is elsewhere.
    An index that belongs to two units, as where an axis is the square of a structure, is multiplied by both gates.
    """
    axes = (*along, gate.axis)
    padded = jnp.concatenate([values, jnp.ones((*values.shape[:-1], 1), values.dtype)], -1)
    for units in units_along(gate, operand.shape[gate.axis], values.shape[-1]):
        spread = jnp.transpose(jnp.take(padded, units, axis=-1), np.argsort(axes).tolist())
        spread = spread.reshape([operand.shape[axis] if axis in axes else 1 for axis in range(operand.ndim)])
        if gate.neutral is not None:
            operand = jnp.where(spread == 0, neutral_of(gate.neutral, operand.dtype), operand)
            continue
        if jnp.issubdtype(operand.dtype, jnp.inexact):
            operand = jnp.where((spread == 0) & ~jnp.isfinite(operand), jnp.zeros((), operand.dtype), operand)
        operand = operand * spread.astype(operand.dtype)
    return operand


def neutral_of(value: float, dtype: Any) -> Array:
    """Write a neutral value in a type; of integers, the end of their range for an infinity."""
    if jnp.issubdtype(dtype, jnp.integer) and np.isinf(value):
        limits = jnp.iinfo(dtype)
        return jnp.asarray(limits.max if value > 0 else limits.min, dtype)
    return jnp.asarray(value).astype(dtype)


def _call(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> list[Any]:
    program = opened(called_program(eqn))
    if "policy" not in eqn.params:
        return evaluate(*program, values, (*here, 0), changes)

    def run(values: list[Any], gate_values: list[Array]) -> tuple[list[Any], list[Array]]:
        placed = [(gate, along, each) for (gate, along, _), each in zip(changes.gates, gate_values, strict=True)]
        own = changes.alone(placed)
        results = evaluate(*program, values, (*here, 0), own)
        return results, [own.found[tap] for tap in changes.taps]

    remat = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    results, found = remat(values, [each for _, _, each in changes.gates])
    changes.found.update(zip(changes.taps, found, strict=True))
    return results


def _scan(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> list[Any]:
    parameters = eqn.params
    first, last = scan_split(eqn)
    constants, carry, stacked = values[:first], values[first:last], values[last:]
    rows = [jnp.moveaxis(each, along.index(here), 0) for _, along, each in changes.gates if here in along]
    program = opened(parameters["jaxpr"])

    def body(carry: list[Any], row: tuple[list[Any], list[Array]]) -> tuple[list[Any], tuple[list[Any], list[Array]]]:
        own = iter(row[1])
        placed = [
            (gate, tuple(axis for axis in along if axis != here), next(own) if here in along else each)
            for gate, along, each in changes.gates
        ]
        inside = changes.alone(placed)
        results = evaluate(*program, [*constants, *carry, *row[0]], (*here, 0), inside)
        return results[: last - first], (results[last - first :], [inside.found[tap] for tap in changes.taps])

    carry, (outputs, found) = jax.lax.scan(
        body, carry, (stacked, rows), parameters["length"], parameters["reverse"], parameters["unroll"]
    )
    changes.found.update(zip(changes.taps, found, strict=True))
    return [*carry, *outputs]


def _while(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> list[Any]:
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]
    condition, body = opened(eqn.params["cond_jaxpr"]), opened(eqn.params["body_jaxpr"])
    return jax.lax.while_loop(
        lambda carry: evaluate(*condition, [*values[:first], *carry], (*here, 0), changes.inside((*here, 0)))[0],
        lambda carry: evaluate(*body, [*values[first:last], *carry], (*here, 1), changes.inside((*here, 1))),
        values[last:],
    )


def _cond(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> list[Any]:
    def branch(number: int) -> Callable[..., list[Any]]:
        program, path = opened(eqn.params["branches"][number]), (*here, number)
        return lambda *operands: evaluate(*program, operands, path, changes.inside(path))

    return jax.lax.switch(values[0], [branch(number) for number in range(len(eqn.params["branches"]))], *values[1:])


_NESTED = {**dict.fromkeys(CALLS, _call), "scan": _scan, "while": _while, "cond": _cond}
