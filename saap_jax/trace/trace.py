"""Stage 1 for any model: coupled structures, read off the traced program.

`trace(function, params, *inputs)` traces a function to a jaxpr from shapes alone, follows every axis of every array
through it, and unites the axes that keep the same size whatever happens to the rest. The atoms that lie in parameters
are the coupled structures. Where the axis names of `structures.py` say what a model's author knows, this says what the
program does; a test holds the two together. Source: the dependency graph of LLM-Pruner (arXiv:2305.11627) and DepGraph
(arXiv:2301.12900), on axes of a jaxpr instead of layers of an autograd graph.

What a jaxpr does not tell: whether a size stands in the code as a number. `prunable` says that the program with smaller
arrays is well-formed; that the user's function yields this program from smaller parameters is for `removal.retrace`
to see.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr

from saap_jax.runtime.mesh import taken_in
from saap_jax.trace.axes import REASONS, Kind, Place
from saap_jax.trace.couplings import Coupling, collect
from saap_jax.trace.nested import alive
from saap_jax.trace.program import Follower, Value
from saap_jax.trace.rules import Contraction

NEUTRAL: dict[str, float] = {
    "reduce_max": -math.inf, "reduce_min": math.inf, "reduce_prod": 1.0, "reduce_and": 1.0, "reduce_or": 0.0,
    "top_k": -math.inf, "argmax": -math.inf, "argmin": math.inf,
}  # fmt: skip
"""What changes nothing in a statistic over units; a sum is a contraction, which gates multiply."""

CHOICES = frozenset({"top_k", "argmax", "argmin"})
"""Reductions that choose among units."""


@dataclasses.dataclass(frozen=True)
class AxisMember:
    """An axis of a parameter along which the units of a structure lie."""

    path: str
    axis: int
    places: tuple[Place, ...]
    """Where the units lie in the axis; several when it is fused of parts, such as query, key and value."""
    shared: tuple[int, ...] = ()
    """Axes of the parameter along which the units may be chosen anew (layers, experts), in the order of `copied`."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """Where the units of a structure act: multiplying this operand by g along an axis multiplies their effect by g."""

    equation: tuple[int, ...]
    """Index of the equation; inside a scan or call: of that equation, of the program inside it, of the one in that."""
    operand: int
    axis: int
    places: tuple[Place, ...]
    along: tuple[int | tuple[int, ...], ...]
    """For each axis of the structure's copies: the operand's axis, or the path of the scan that runs over it."""
    where: str
    neutral: float | None = None
    """Where no product takes a unit away, as in a maximum: the value that a removed unit gets instead."""


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a structure keeps its size."""

    kind: Kind
    detail: str
    where: str

    def __str__(self) -> str:
        """Return the reason in words."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{REASONS[self.kind]}{detail}" + (f" at {self.where}" if self.where else "")


@dataclasses.dataclass(frozen=True)
class TracedStructure:
    """Axes of parameters that must be cut together."""

    name: str
    """The first member's path and axis; numbered from the second structure of that axis on."""
    units: int
    copied: tuple[int, ...]
    """Sizes of the axes along which the units may be chosen anew (layers of a scan, experts), each time as many."""
    members: tuple[AxisMember, ...]
    parameters_per_unit: int
    """Parameters that one unit of one copy takes with it."""
    pinned: tuple[Reason, ...]
    normalised: tuple[str, ...]
    """Equations that take a statistic over the units, such as the mean of a norm: it changes when a unit goes."""
    gates: tuple[Gate, ...]
    """Where the units act. Multiplied by zero at all of them, a unit is gone, but for its part in statistics."""
    statistics: tuple[Gate, ...] = ()
    """Maxima and their kin over the units, which see removed ones as what changes nothing."""
    role: str = "channels"
    """What the units are to a reader: channels, heads, query heads, head width, experts or stream."""
    least: int = 0
    """Units that have to remain, such as the k of a router's `top_k`."""

    @property
    def copies(self) -> int:
        """How often the units may be chosen anew."""
        return math.prod(self.copied)

    @property
    def prunable(self) -> bool:
        """Whether units can be removed."""
        return not self.pinned

    @property
    def gate(self) -> Gate | None:
        """The place where a unit's effect is one multiplication, if there is one."""
        return self.gates[0] if len(self.gates) == 1 and not self.normalised and self.prunable else None


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program and its coupled structures."""

    structures: tuple[TracedStructure, ...]
    unknown: tuple[str, ...]
    """Operations without a rule, and where: all axes that they touch are pinned."""
    equations: int
    shapes: dict[str, tuple[int, ...]]
    """Shape of each parameter by path."""
    program: ClosedJaxpr = dataclasses.field(repr=False)
    results: Any
    """The pytree of the shapes of the outputs."""
    follower: Follower = dataclasses.field(repr=False)
    atoms: dict[str, int] = dataclasses.field(repr=False)
    """The atom of each structure in the follower's axes."""
    layouts: dict[str, tuple[int, ...]] = dataclasses.field(repr=False)
    """The node of each axis of each parameter by path, in the follower's axes."""

    @property
    def prunable(self) -> tuple[TracedStructure, ...]:
        """The structures of which units can be removed."""
        return tuple(structure for structure in self.structures if structure.prunable)


@taken_in
def trace(function: Callable[..., Any], params: Any, *inputs: Any) -> Traced:
    """Return the coupled structures of `function(params, *inputs)`.

    Arrays and `jax.ShapeDtypeStruct`s serve alike: nothing is computed. `params` is any pytree: an NNX module or state,
    the variables of a Linen module (`module.apply` is the function). Arrays that the function holds itself are
    constants and pin the sizes that they meet.

    >>> def mlp(params, x):
    ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
    >>> params = {"up": jax.ShapeDtypeStruct((3, 4), "float32"), "down": jax.ShapeDtypeStruct((4, 2), "float32")}
    >>> (hidden,) = trace(mlp, params, jax.ShapeDtypeStruct((5, 3), "float32")).prunable
    >>> hidden.units, [(member.path, member.axis) for member in hidden.members]
    (4, [('down', 0), ('up', 1)])

    Raises:
        ValueError: `params` holds no arrays.
    """
    paths = parameter_paths(params)
    if not paths:
        raise ValueError(f"params: expected a pytree of arrays or jax.ShapeDtypeStructs, got {params!r}")
    program, results = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    program = alive(program)
    follower = Follower()
    axes = follower.notes.axes
    variables = [tuple(int(size) for size in variable.aval.shape) for variable in program.jaxpr.invars]
    values = [Value(tuple(map(axes.atom, shape)), False) for shape in variables[: len(paths)]]
    values += [
        Value(tuple(axes.pinned(size, "input", "") for size in shape), True) for shape in variables[len(paths) :]
    ]
    last = follower.run(program.jaxpr, program.consts, values)
    axes.site = None
    for result in follower.plain(last):
        for node in result.layout:
            axes.pin(node, "output", "")
    layouts = {path: value.layout for path, value in zip(paths, values, strict=False)}
    found = collect(follower, layouts)
    structures = _named(_structure(follower, layouts, coupling) for coupling in found)
    unknown = tuple(f"{name} at {site.place}" for name, site in follower.notes.unknown)
    shapes = dict(zip(paths, variables, strict=False))
    atoms = {structure.name: each.atom for structure, each in zip(structures, found, strict=True)}
    return Traced(structures, unknown, follower.equations, shapes, program, results, follower, atoms, layouts)


def parameter_paths(params: Any) -> list[str]:
    """Return the path of each array of a pytree, in order; that of an `nnx.Variable` is the variable's."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    paths = []
    for path, leaf in leaves:
        within = [inner for inner, _ in jax.tree_util.tree_flatten_with_path(leaf)[0]]
        if len(within) < 2:
            within = [()] * len(within)
        paths += [jax.tree_util.keystr((*path, *inner), simple=True, separator="/") for inner in within]
    if len(set(paths)) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise ValueError(f"params: expected paths that differ, got {twice} twice; rename one of the two")
    return paths


def describe(traced: Traced, *, pinned: bool = True) -> str:
    """Return the structures as text: what is prunable, then (if asked for) what is pinned, and why."""
    lines = []
    for structure in sorted(traced.structures, key=lambda structure: not structure.prunable):
        if structure.prunable or pinned:
            lines += _described(structure)
    lines += [f"no rule for {operation}: its axes are pinned" for operation in traced.unknown]
    return "\n".join(lines)


def _described(structure: TracedStructure) -> list[str]:
    times = f" in each of {structure.copies}" if structure.copies > 1 else ""
    head = f"{structure.name}: {structure.units} units{times}, {structure.parameters_per_unit:,} parameters a unit"
    lines = [head + (", prunable" if structure.prunable else ", pinned")]
    lines += [f"    {member.path}[{member.axis}]{_placed(member)}" for member in structure.members]
    lines += [f"    it {reason}" for reason in structure.pinned]
    if structure.prunable:
        lines += [f"    changes the statistic of {where}" for where in structure.normalised]
        lines += [f"    acts at {gate.where}, operand {gate.operand}, axis {gate.axis}" for gate in structure.gates]
    return lines


def _placed(member: AxisMember) -> str:
    if len(member.places) == 1 and member.places[0] == Place(0, 1):
        return ""
    return "".join(
        f" from {place.offset}, block {place.block}"
        + "".join(f", {count} times every {stride}" for count, stride in place.repeats)
        for place in member.places
    )


def _named(structures: Iterable[TracedStructure]) -> tuple[TracedStructure, ...]:
    """Tell structures apart whose first member is the same axis."""
    named: dict[str, TracedStructure] = {}
    for structure in structures:
        name, number = structure.name, 1
        while name in named:
            number += 1
            name = f"{structure.name}.{number}"
        named[name] = dataclasses.replace(structure, name=name)
    return tuple(named.values())


def _structure(follower: Follower, layouts: dict[str, tuple[int, ...]], coupling: Coupling) -> TracedStructure:
    axes, notes, atom = follower.notes.axes, follower.notes, coupling.atom
    copied = sorted(coupling.companions)
    members, removed = [], 0
    for path in coupling.holders:
        layout = layouts[path]
        lost = [axes.drop(node, atom) for node in layout]
        shape = [axes.size(node) for node in layout]
        removed += math.prod(shape) - math.prod(n - gone for n, gone in zip(shape, lost, strict=True))
        roots = [axes.find(node) for node in layout]
        shared = tuple(roots.index(companion) for companion in copied)
        members += [
            AxisMember(path, axis, axes.places(layout[axis], atom), shared) for axis, gone in enumerate(lost) if gone
        ]
    gates = [_gate(follower, notes.contractions[i], atom, copied) for i in coupling.contractions]
    reductions = [notes.reductions[i] for i in coupling.reductions]
    statistics = [
        dataclasses.replace(
            _gate(follower, Contraction(each.node, 0, each.axis, each.layout, each.site), atom, copied),
            neutral=NEUTRAL[each.operation],
        )
        for each in reductions
        if each.operation in NEUTRAL and not coupling.pins
    ]
    reasons = {Reason(pin.kind, pin.detail, pin.site.place if pin.site else ""): None for pin in coupling.pins}
    sizes = tuple(map(axes.size, copied))
    return TracedStructure(
        name=f"{members[0].path}[{members[0].axis}]",
        units=axes.size(atom),
        copied=sizes,
        members=tuple(members),
        parameters_per_unit=removed // math.prod(sizes),
        pinned=tuple(reasons),
        normalised=tuple(str(each.site) for each in reductions),
        gates=tuple(dict.fromkeys(gates)),
        statistics=tuple(dict.fromkeys(statistics)),
        role=coupling.role,
        least=max((each.least for each in reductions if each.operation in CHOICES), default=0),
    )


def _gate(follower: Follower, found: Contraction, atom: int, copied: list[int]) -> Gate:
    axes, along = follower.notes.axes, []
    scans: dict[int, tuple[int, ...]] = {}
    site = found.site.parent
    while site is not None:
        if site.path in follower.lengths:
            scans[axes.find(follower.lengths[site.path])] = site.path
        site = site.parent
    roots = [axes.find(node) for node in found.layout]
    for companion in copied:
        along.append(roots.index(companion) if companion in roots else scans[companion])
    places = axes.places(found.node, atom)
    return Gate(found.site.path, found.operand, found.axis, places, tuple(along), str(found.site))
