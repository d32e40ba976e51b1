"""Evaluate a traced program equation by equation, with changes: operands multiplied by gates, other sizes, taps.

Equations without a change inside are bound as they are; calls that hold one are inlined, so a custom derivative of such
a call is that of its program, and `jax.checkpoint` is put around it anew.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from saap_jax.trace.nested import called_program, inner_programs, manual_axes, opened, scan_split
from saap_jax.trace.program import CALLS
from saap_jax.trace.rules import dtype_of
from saap_jax.trace.trace import Gate

Path = tuple[int, ...]
"""Where an equation stands: see `Gate.equation`."""

Placed = list[tuple[Gate, tuple[Any, ...], Array]]
"""Gates, what the axes of each one's values run along (`Gate.along`, less the scans around), and the values."""

Tap = tuple[Path, int]
"""An equation and one of its operands, the values of which are wanted."""

Resize = Callable[[Path, JaxprEqn, Sequence[Any]], dict[str, Any]]
"""Returns the parameters of an equation for operands of other shapes."""

Replace = Callable[[JaxprEqn], Callable[..., Sequence[Any]] | None]
"""Returns what computes the results of an equation in its place, if anything does."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """How the evaluation of a program differs from the program."""

    gates: Placed
    resize: Resize | None = None
    replace: Replace | None = None
    taps: Sequence[Tap] = ()
    """Operands of equations that lie in no branch, `while` loop or `shard_map`."""
    found: dict[Tap, Array] = dataclasses.field(default_factory=dict)
    """Gets their values, behind gates; within scans, the turns come first."""

    def inside(self, path: Path) -> "Changes":
        """Return the changes at or below a place."""
        below = [each for each in self.gates if each[0].equation[: len(path)] == path]
        return dataclasses.replace(self, gates=below)

    def alone(self, gates: Placed) -> "Changes":
        """Return the same with gates of another trace, and a place of their own for values that are found."""
        return dataclasses.replace(self, gates=gates, found={})


def evaluate(jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any], path: Path, changes: Changes) -> list[Any]:
    """Return the results of a program, or of one inside it at `path`, with changes that all lie in it.

    A literal may be a Python number: it becomes an array, for what is asked for its shape.
    """
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, dtype_of(atom)) if isinstance(atom, Literal) else known[atom]

    gates: dict[int, Placed] = {}
    for each in changes.gates:
        gates.setdefault(each[0].equation[len(path)], []).append(each)
    taps: dict[int, list[Tap]] = {}
    for tap in changes.taps:
        taps.setdefault(tap[0][len(path)], []).append(tap)
    for number, eqn in enumerate(jaxpr.eqns):
        here = (*path, number)
        inside = dataclasses.replace(changes, gates=gates.get(number, []), taps=taps.get(number, ()))
        values = [read(atom) for atom in eqn.invars]
        for gate, along, gate_values in inside.gates:
            if gate.equation == here:
                values[gate.operand] = multiply(values[gate.operand], gate, along, gate_values)
        changes.found.update({tap: values[tap[1]] for tap in inside.taps if tap[0] == here})
        nested, other = _NESTED.get(eqn.primitive.name), changes.replace and changes.replace(eqn)
        below = any(
            place != here
            for place in [*(gate.equation for gate, _, _ in inside.gates), *(tap[0] for tap in inside.taps)]
        )
        if other:
            results = other(*values)
        elif nested and (below or _changes_inside(eqn, changes)):
            results = nested(eqn, values, here, inside)
        else:
            parameters = eqn.primitive.get_bind_params(eqn.params)
            if changes.resize:
                parameters = changes.resize(here, eqn, values)
            results = eqn.primitive.bind(*values, **parameters)
            results = results if eqn.primitive.multiple_results else [results]
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _changes_inside(eqn: JaxprEqn, changes: Changes) -> bool:
    """Say whether a program inside an equation has to be evaluated anew, whatever gates there are."""
    replace = changes.replace
    if replace is None or changes.resize is not None:
        return changes.resize is not None
    return any(replace(each) or _changes_inside(each, changes) for program in inner_programs(eqn) for each in program)


def multiply(operand: Array, gate: Gate, along: tuple[Any, ...], values: Array) -> Array:
    """Multiply an operand by the gates of its units; indices that belong to no unit stay as they are.

    A unit whose gate is 0 is 0 afterwards even if it was infinite, as it may be behind a statistic that it has no part
    in. Where the gate has a neutral value, the operand gets that where the gate is 0, and stays as it is elsewhere.
    An index that belongs to two units, as where an axis is the square of a structure, is multiplied by both gates.
    """
    none = values.shape[-1]
    layers = [np.full(operand.shape[gate.axis], none)]
    for place in gate.places:
        own = [place.indices(unit) for unit in range(none)]
        if (layers[-1][np.concatenate(own)] != none).any():
            layers.append(np.full_like(layers[0], none))
        for unit, indices in enumerate(own):
            layers[-1][indices] = unit
    for units in layers:
        operand = _multiplied(operand, units, gate, along, values)
    return operand


def _multiplied(operand: Array, units: np.ndarray, gate: Gate, along: tuple[Any, ...], values: Array) -> Array:
    """Multiply each index along a gate's axis by the gate of one unit, the last number standing for none."""
    ones = jnp.ones((*values.shape[:-1], 1), values.dtype)
    spread = jnp.take(jnp.concatenate([values, ones], -1), units, axis=-1)
    axes = (*along, gate.axis)
    spread = jnp.transpose(spread, np.argsort(axes).tolist())
    shape = [operand.shape[axis] if axis in axes else 1 for axis in range(operand.ndim)]
    spread = spread.reshape(shape)
    if gate.neutral is not None:
        return jnp.where(spread == 0, neutral_of(gate.neutral, operand.dtype), operand)
    if jnp.issubdtype(operand.dtype, jnp.inexact):
        operand = jnp.where((spread == 0) & ~jnp.isfinite(operand), jnp.zeros((), operand.dtype), operand)
    return operand * spread.astype(operand.dtype)


def neutral_of(value: float, dtype: Any) -> Array:
    """Return a neutral value in a type; of integers, the end of their range for an infinity."""
    if jnp.issubdtype(dtype, jnp.integer) and np.isinf(value):
        limits = jnp.iinfo(dtype)
        return jnp.asarray(limits.max if value > 0 else limits.min, dtype)
    return jnp.asarray(value).astype(dtype)


def _call(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], changes: Changes) -> list[Any]:
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


def _scan(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], changes: Changes) -> list[Any]:
    parameters = eqn.params
    first, last = scan_split(eqn)
    constants, carry, stacked = values[:first], values[first:last], values[last:]
    rows = [jnp.moveaxis(each, along.index(here), 0) for _, along, each in changes.gates if here in along]
    program = opened(parameters["jaxpr"])

    def body(carry: list[Any], row: tuple[list[Any], list[Array]]) -> tuple[list[Any], tuple[list[Any], list[Array]]]:
        own = iter(row[1])
        placed = changes.alone(
            [
                (gate, tuple(axis for axis in along if axis != here), next(own) if here in along else each)
                for gate, along, each in changes.gates
            ]
        )
        results = evaluate(*program, [*constants, *carry, *row[0]], (*here, 0), placed)
        return results[: last - first], (results[last - first :], [placed.found[tap] for tap in changes.taps])

    carry, (outputs, found) = jax.lax.scan(
        body, carry, (stacked, rows), parameters["length"], parameters["reverse"], parameters["unroll"]
    )
    changes.found.update(zip(changes.taps, found, strict=True))
    return [*carry, *outputs]


def _while(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], changes: Changes) -> list[Any]:
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]
    condition, body = opened(eqn.params["cond_jaxpr"]), opened(eqn.params["body_jaxpr"])
    return jax.lax.while_loop(
        lambda carry: evaluate(*condition, [*values[:first], *carry], (*here, 0), changes.inside((*here, 0)))[0],
        lambda carry: evaluate(*body, [*values[first:last], *carry], (*here, 1), changes.inside((*here, 1))),
        values[last:],
    )


def _cond(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], changes: Changes) -> list[Any]:
    def branch(number: int) -> Callable[..., list[Any]]:
        program, path = opened(eqn.params["branches"][number]), (*here, number)
        return lambda *operands: evaluate(*program, operands, path, changes.inside(path))

    return jax.lax.switch(values[0], [branch(number) for number in range(len(eqn.params["branches"]))], *values[1:])


def _shard_map(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], changes: Changes) -> list[Any]:
    parameters, program = eqn.params, opened(eqn.params["jaxpr"])

    def run(values: list[Any], gate_values: list[Array]) -> list[Any]:
        placed = [(gate, along, each) for (gate, along, _), each in zip(changes.gates, gate_values, strict=True)]
        return evaluate(*program, values, (*here, 0), dataclasses.replace(changes, gates=placed))

    gates = [each for _, _, each in changes.gates]
    return jax.shard_map(
        run,
        mesh=parameters["mesh"],
        in_specs=(list(parameters["in_specs"]), [jax.sharding.PartitionSpec()] * len(gates)),
        out_specs=list(parameters["out_specs"]),
        check_vma=parameters["check_vma"],
        axis_names=manual_axes(eqn),
    )(values, gates)


_NESTED = {**dict.fromkeys(CALLS, _call), "scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
