"""A gate on every unit of a traced program, without a change to the model's code.

`gated(traced)` is the program with each structure's activations multiplied by gates where its units act: the model in
its dense and masked states, for estimators that differentiate the loss by gates. Equations without gates inside are
bound as they are; calls that hold gates are inlined, so a custom derivative of such a call is that of its program.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float

from saap_jax.discovery.program import CALLS
from saap_jax.discovery.trace import Gate, Traced, TracedStructure

StructureGates = dict[str, Float[Array, "*_copied _units"]]
"""Gates of traced structures by name: one for each unit of each copy (of each layer of a scan, each expert)."""

Placed = list[tuple[Gate, tuple[Any, ...], Array]]
"""Gates, what the axes of each one's values run along (`Gate.along`, less the scans around), and the values."""


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
    prunable = {structure.name: structure for structure in traced.prunable}
    tree = jax.tree.structure(traced.results)

    def function(gates: StructureGates, params: Any, *inputs: Any) -> Any:
        placed: Placed = []
        for name, values in gates.items():
            if name not in prunable:
                raise ValueError(f"gates: expected names of prunable structures {sorted(prunable)}, got {name}")
            structure = prunable[name]
            if values.shape != (*structure.copied, structure.units):
                shape = (*structure.copied, structure.units)
                raise ValueError(f"gates of {name}: expected shape {shape}, got {values.shape}")
            placed += [(gate, gate.along, values) for gate in structure.gates]
        flat = jax.tree.leaves((params, inputs))
        results = _run(traced.program.jaxpr, traced.program.consts, flat, (), placed)
        return jax.tree.unflatten(tree, results)

    return function


def _run(jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any], path: tuple[int, ...], gates: Placed) -> list:
    """Evaluate a jaxpr with gates."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        inside = [each for each in gates if each[0].equation[: len(here)] == here]
        values = [read(atom) for atom in eqn.invars]
        for gate, along, gate_values in inside:
            if gate.equation == here:
                values[gate.operand] = multiply(values[gate.operand], gate, along, gate_values)
        if any(gate.equation != here for gate, _, _ in inside):
            results = _NESTED[eqn.primitive.name](eqn, values, here, inside)
        else:
            results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def multiply(operand: Array, gate: Gate, along: tuple[Any, ...], values: Array) -> Array:
    """Multiply an operand by the gates of its units; indices that belong to no unit stay as they are."""
    units = np.full(operand.shape[gate.axis], values.shape[-1])
    for place in gate.places:
        for unit in range(values.shape[-1]):
            units[place.indices(unit)] = unit
    ones = jnp.ones((*values.shape[:-1], 1), values.dtype)
    spread = jnp.take(jnp.concatenate([values, ones], -1), units, axis=-1)
    axes = (*along, gate.axis)
    spread = jnp.transpose(spread, np.argsort(axes).tolist())
    shape = [operand.shape[axis] if axis in axes else 1 for axis in range(operand.ndim)]
    return operand * spread.reshape(shape).astype(operand.dtype)


def _parts(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    return (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())


def _call(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], gates: Placed) -> list[Any]:
    key = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    program = _parts(eqn.params[key])
    if "policy" not in eqn.params:
        return _run(*program, values, (*here, 0), gates)

    def run(values: list[Any], gate_values: list[Array]) -> list[Any]:
        placed = [(gate, along, each) for (gate, along, _), each in zip(gates, gate_values, strict=True)]
        return _run(*program, values, (*here, 0), placed)

    remat = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return remat(values, [each for _, _, each in gates])


def _scan(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], gates: Placed) -> list[Any]:
    parameters = eqn.params
    first, last = parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"]
    constants, carry, stacked = values[:first], values[first:last], values[last:]
    rows = [jnp.moveaxis(each, along.index(here), 0) for _, along, each in gates if here in along]
    program = _parts(parameters["jaxpr"])

    def body(carry: list[Any], row: tuple[list[Any], list[Array]]) -> tuple[list[Any], list[Any]]:
        own = iter(row[1])
        placed = [
            (gate, tuple(axis for axis in along if axis != here), next(own) if here in along else each)
            for gate, along, each in gates
        ]
        results = _run(*program, [*constants, *carry, *row[0]], (*here, 0), placed)
        return results[: last - first], results[last - first :]

    carry, outputs = jax.lax.scan(
        body, carry, (stacked, rows), parameters["length"], parameters["reverse"], parameters["unroll"]
    )
    return [*carry, *outputs]


def _while(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], gates: Placed) -> list[Any]:
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]
    condition, body = _parts(eqn.params["cond_jaxpr"]), _parts(eqn.params["body_jaxpr"])
    return jax.lax.while_loop(
        lambda carry: _run(*condition, [*values[:first], *carry], (*here, 0), _inside(gates, (*here, 0)))[0],
        lambda carry: _run(*body, [*values[first:last], *carry], (*here, 1), _inside(gates, (*here, 1))),
        values[last:],
    )


def _cond(eqn: JaxprEqn, values: list[Any], here: tuple[int, ...], gates: Placed) -> list[Any]:
    def branch(number: int) -> Callable[..., list[Any]]:
        program, path = _parts(eqn.params["branches"][number]), (*here, number)
        return lambda *operands: _run(*program, operands, path, _inside(gates, path))

    return jax.lax.switch(values[0], [branch(number) for number in range(len(eqn.params["branches"]))], *values[1:])


def _inside(gates: Placed, path: tuple[int, ...]) -> Placed:
    return [each for each in gates if each[0].equation[: len(path)] == path]


_NESTED = {**dict.fromkeys(CALLS, _call), "scan": _scan, "while": _while, "cond": _cond}
