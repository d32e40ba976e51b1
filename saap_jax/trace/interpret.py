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
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import Array, Float

from saap_jax.trace.jaxpr import CALLS, called_program, dtype_of, opened, scan_split
from saap_jax.trace.program import Path, Tap
from saap_jax.trace.trace import Gate, Traced

Placed = Sequence[tuple[Gate, tuple[Any, ...], Array]]
"""Gates, what the axes of each one's values run along (`Gate.along`, less the scans around), and the values."""

StructureGates = dict[str, Float[Array, "*_copied _units"]]
"""Gates of traced structures by name: one for each unit of each copy (of each layer of a scan, each expert)."""

Found = dict[Tap, Array]
"""Values of operands, behind gates; within scans, the turns come first."""


def gated(traced: Traced) -> Callable[..., Any]:
    """Make `function(gates, params, *inputs)`, which is the traced function but for the gates.

    `gates` names the structures that have them; the inputs have the shapes that were traced. A size that the traced
    program holds as a number (the divisor of a mean, the scale of attention scores) stays that of the dense model.

    Raises:
        ValueError: a name that is no prunable structure of the program, or gates of another shape.
    """
    run = tapped(traced, ())
    return lambda gates, params, *inputs: run(gates, params, *inputs)[0]


def tapped(traced: Traced, taps: Sequence[Tap]) -> Callable[..., tuple[Any, Found]]:
    """Make `gated(traced)` with a second result: the values of operands that lie in no branch or `while` loop."""
    prunable = {structure.name: structure for structure in traced.prunable}
    tree = jax.tree.structure(traced.results)

    def function(gates: StructureGates, params: Any, *inputs: Any) -> tuple[Any, Found]:
        placed = []
        for name, values in gates.items():
            if name not in prunable:
                raise ValueError(f"gates: expected names of prunable structures {sorted(prunable)}, got {name}")
            structure = prunable[name]
            if values.shape != (shape := (*structure.copied, structure.units)):
                raise ValueError(f"gates of {name}: expected shape {shape}, got {values.shape}")
            placed += [(gate, gate.along, values) for gate in (*structure.gates, *structure.statistics)]
        changes = Changes(placed, tuple(taps))
        results, found = evaluate(traced.program, jax.tree.leaves((params, inputs)), (), changes)
        return jax.tree.unflatten(tree, results), found

    return function


@dataclasses.dataclass(frozen=True)
class Changes:
    """How the evaluation of a program differs from the program."""

    gates: Placed = ()
    taps: Sequence[Tap] = ()
    """Operands whose values are wanted."""
    resize: Callable[[Path, JaxprEqn, Sequence[Any]], dict[str, Any] | None] | None = None
    """Makes the parameters of an equation for operands of other shapes; None where it and what is in it have none."""

    def inside(self, path: Path) -> "Changes":
        """Choose the changes at or below a place."""
        below = [each for each in self.gates if each[0].equation[: len(path)] == path]
        return Changes(below, [tap for tap in self.taps if tap[0][: len(path)] == path], self.resize)


def evaluate(program: Any, inputs: Sequence[Any], path: Path, changes: Changes) -> tuple[list[Any], Found]:
    """Evaluate a program, or one inside it at `path`, with changes that all lie in it.

    A literal may be a Python number: it becomes an array, for what is asked for its shape.
    """
    (jaxpr, constants) = opened(program)
    found = {}
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return np.asarray(atom.val, dtype_of(atom))
        return known[atom]

    places = [gate.equation for gate, _, _ in changes.gates] + [equation for equation, _ in changes.taps]
    busy = {place[len(path)] for place in places}
    idle = Changes(resize=changes.resize)
    for number, eqn in enumerate(jaxpr.eqns):
        here = (*path, number)
        values = [read(atom) for atom in eqn.invars]
        inside = changes.inside(here) if number in busy else idle
        for gate, along, gate_values in inside.gates:
            if gate.equation == here:
                values[gate.operand] = multiply(values[gate.operand], gate, along, gate_values)
        found |= {tap: values[tap[1]] for tap in inside.taps if tap[0] == here}
        nested = _NESTED.get(eqn.primitive.name)
        parameters = None
        if changes.resize:
            parameters = changes.resize(here, eqn, values)
        if nested and (parameters is not None or any(p != here for p in places if p[len(path)] == number)):
            results, more = nested(eqn, values, here, inside)
            found |= more
        else:
            if parameters is None:
                parameters = eqn.primitive.get_bind_params(eqn.params)
            results = eqn.primitive.bind(*values, **parameters)
            if not eqn.primitive.multiple_results:
                results = [results]
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars], found


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
    in. Where the gate has a neutral value, the operand gets that where the gate is 0 (for an infinity, integers get the
    end of their range), and stays as it is elsewhere. An index that belongs to two units, as where an axis is the
    square of a structure, is multiplied by both gates.
    """
    axes = (*along, gate.axis)
    padded = jnp.concatenate([values, jnp.ones((*values.shape[:-1], 1), values.dtype)], -1)
    for units in units_along(gate, operand.shape[gate.axis], values.shape[-1]):
        spread = jnp.transpose(jnp.take(padded, units, axis=-1), np.argsort(axes).tolist())
        spread = spread.reshape([operand.shape[axis] if axis in axes else 1 for axis in range(operand.ndim)])
        if gate.neutral is not None:
            neutral: Any = gate.neutral
            if operand.dtype == bool:
                neutral = neutral not in (0, -np.inf)
            elif jnp.issubdtype(operand.dtype, jnp.integer):
                ends = jnp.iinfo(operand.dtype)
                neutral = (ends.max if neutral > 0 else ends.min) if np.isinf(neutral) else int(neutral)
            operand = jnp.where(spread == 0, np.asarray(neutral).astype(operand.dtype), operand)
            continue
        if jnp.issubdtype(operand.dtype, jnp.inexact):
            operand = jnp.where((spread == 0) & ~jnp.isfinite(operand), jnp.zeros((), operand.dtype), operand)
        operand = operand * spread.astype(operand.dtype)
    return operand


def _call(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> tuple[list[Any], Found]:
    def run(*values: Any) -> tuple[list[Any], Found]:
        return evaluate(called_program(eqn), values, (*here, 0), changes)

    if "policy" in eqn.params:
        run = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return run(*values)


def _scan(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> tuple[list[Any], Found]:
    parameters = eqn.params
    first, last = scan_split(eqn)
    rows = [jnp.moveaxis(each, along.index(here), 0) for _, along, each in changes.gates if here in along]

    def body(carry: list[Any], row: tuple[list[Any], list[Array]]) -> tuple[list[Any], tuple[list[Any], Found]]:
        stacked = row[0]
        own = iter(row[1])
        placed = [
            (gate, tuple(axis for axis in along if axis != here), next(own) if here in along else each)
            for gate, along, each in changes.gates
        ]
        operands = [*values[:first], *carry, *stacked]
        inside = dataclasses.replace(changes, gates=placed)
        results, found = evaluate(parameters["jaxpr"], operands, (*here, 0), inside)
        return results[: last - first], (results[last - first :], found)

    carry, (outputs, found) = jax.lax.scan(
        body, values[first:last], (values[last:], rows), parameters["length"], parameters["reverse"],
        parameters["unroll"],
    )  # fmt: skip
    return [*carry, *outputs], found


def _while(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> tuple[list[Any], Found]:
    """Go on while the condition holds; below `vmap` it is one for each row, and rows that are done stay as they are."""
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]

    def part(number: int, name: str, constants: list[Any]) -> Callable[..., list[Any]]:
        path = (*here, number)
        return lambda carry: evaluate(eqn.params[name], [*constants, *carry], path, changes.inside(path))[0]

    condition = part(0, "cond_jaxpr", values[:first])
    body = part(1, "body_jaxpr", values[first:last])
    if not eqn.params["cond_jaxpr"].out_avals[0].shape:
        return jax.lax.while_loop(lambda carry: condition(carry)[0], body, values[last:]), {}

    def turn(carry: list[Any]) -> list[Any]:
        going = condition(carry)[0]
        spread = [going.reshape(going.shape + (1,) * (each.ndim - going.ndim)) for each in carry]
        return [jnp.where(*each) for each in zip(spread, body(carry), carry, strict=True)]

    return jax.lax.while_loop(lambda carry: jnp.any(condition(carry)[0]), turn, values[last:]), {}


def _cond(eqn: JaxprEqn, values: list[Any], here: Path, changes: Changes) -> tuple[list[Any], Found]:
    def branch(number: int, program: Any) -> Callable[..., list[Any]]:
        path = (*here, number)
        return lambda *operands: evaluate(program, operands, path, changes.inside(path))[0]

    branches = [branch(number, program) for number, program in enumerate(eqn.params["branches"])]
    return jax.lax.switch(values[0], branches, *values[1:]), {}


_NESTED = {**dict.fromkeys(CALLS, _call), "scan": _scan, "while": _while, "cond": _cond}
