"""The program of a traced function at other input shapes, with the structures of the first trace under their names.

A traced program holds the shapes of its inputs: another sequence length is another program. Which axes of parameters
belong together does not depend on it, so what was chosen at one length is cut at any.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from saap_jax.trace.trace import Traced, TracedStructure, trace

Shapes = tuple[Any, ...]
"""What tells inputs apart: their tree, and shape and type of each array."""


def shapes_of(inputs: Any) -> Shapes:
    """Return the tree of inputs, and shape and type of each array, as a key."""
    leaves, tree = jax.tree.flatten(inputs)
    return (tree, *((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves))


def abstract(tree: Any) -> Any:
    """Return arrays as shapes and types."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def traced_at(function: Callable[..., Any], params: Any, traced: Traced, names: Sequence[str], *inputs: Any) -> Traced:
    """Trace a function again at other input shapes; the structures have the names and copies of the first trace.

    Args:
        params: the dense parameters, or their shapes.
        traced: the first trace.
        names: the structures that are to be cut; others may differ.

    Raises:
        ValueError: the function cannot be traced so, or a structure is not the same there.
    """
    said = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(inputs))
    try:
        again = trace(function, abstract(params), *abstract(inputs))
    except Exception as error:  # whatever the function raises
        raise ValueError(
            f"the function cannot be traced with inputs {said}: {type(error).__name__}: {error}; expected inputs that "
            "the dense model takes"
        ) from error
    wanted = {each.name: each for each in traced.structures}
    found = {_members(each): each for each in again.structures}
    structures, atoms = [], {}
    for name in names:
        same = found.get(_members(wanted[name]))
        place = f"structure {name} with inputs {said}"
        if same is None:
            raise ValueError(
                f"{place}: expected the members of the first trace, "
                f"{', '.join(f'{m.path}[{m.axis}]' for m in wanted[name].members)}, found no structure of these; trace "
                "the model at this shape, or leave the structure alone (search.max_ratio_each 0)"
            )
        if same.pinned:
            raise ValueError(
                f"{place}: expected one that can be pruned, as in the first trace, but it {same.pinned[0]}"
            )
        structures.append(_ordered(wanted[name], same, place))
        atoms[name] = again.atoms[same.name]
    return dataclasses.replace(again, structures=tuple(structures), atoms=atoms)


def _members(structure: TracedStructure) -> frozenset[Any]:
    """Return what a structure is made of, whatever the order of its copies."""
    return frozenset((m.path, m.axis, frozenset(m.places), frozenset(m.shared)) for m in structure.members)


def _ordered(first: TracedStructure, again: TracedStructure, place: str) -> TracedStructure:
    """Return a structure under the name of the first trace's, its copies in that one's order."""
    member = first.members[0]
    same = next(each for each in again.members if (each.path, each.axis) == (member.path, member.axis))
    order = [same.shared.index(axis) for axis in member.shared]
    members = tuple(dataclasses.replace(m, shared=tuple(m.shared[i] for i in order)) for m in again.members)
    shared = {(m.path, m.axis): m.shared for m in first.members}
    if any(shared[m.path, m.axis] != m.shared for m in members) or first.units != again.units:
        raise ValueError(f"{place}: expected the copies of the first trace, {first.copied}, got others")

    def along(gates: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dataclasses.replace(gate, along=tuple(gate.along[i] for i in order)) for gate in gates)

    return dataclasses.replace(
        again,
        name=first.name,
        copied=tuple(again.copied[i] for i in order),
        members=members,
        gates=along(again.gates),
        statistics=along(again.statistics),
    )
