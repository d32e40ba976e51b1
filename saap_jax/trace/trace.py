"""Coupled structures of any model, read off its traced program.

`trace(function, params, *inputs)` traces a function to a jaxpr from shapes alone, follows every axis of every array
through it, and unites the axes that keep the same size whatever happens to the rest. The atoms that lie in parameters
are the coupled structures. Where axis names say what a model's author knows, this says what the program does; a test
holds the two together. Source: the dependency graph of LLM-Pruner (arXiv:2305.11627) and DepGraph (arXiv:2301.12900),
on axes of a jaxpr instead of layers of an autograd graph.

What a jaxpr does not tell: whether a size stands in the code as a number. `prunable` says that the program with smaller
arrays is well-formed; that the user's function yields this program from smaller parameters is for `own_code` to see.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr

from saap_jax.runtime.mesh import refuse_explicit_axes
from saap_jax.trace.axes import ONE, REASONS, Pin, Place
from saap_jax.trace.jaxpr import alive, dtype_of, shape_of
from saap_jax.trace.program import Follower, Moved, Value
from saap_jax.trace.rules import Acting, Layout

T = TypeVar("T")

NEUTRAL: dict[str, float] = {
    "reduce_max": -math.inf, "reduce_min": math.inf, "reduce_prod": 1.0, "reduce_and": -1.0, "reduce_or": 0.0,
    "top_k": -math.inf, "argmax": -math.inf, "argmin": math.inf,
}  # fmt: skip
"""What changes nothing in a statistic over units (-1: all bits); a sum is a contraction, which gates multiply."""


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

    kind: str
    """A key of `REASONS`."""
    detail: str
    where: str

    def __str__(self) -> str:
        """Put the reason into words."""
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
    """Units that have to remain, such as the k of a router's `top_k`; 0 where nothing chooses among them."""

    @property
    def copies(self) -> int:
        """How often the units may be chosen anew."""
        return math.prod(self.copied)

    @property
    def prunable(self) -> bool:
        """Whether units can be removed."""
        return not self.pinned


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program and its coupled structures."""

    structures: tuple[TracedStructure, ...]
    unknown: tuple[str, ...]
    """Operations without a rule, and where: all axes that they touch are pinned."""
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

    @property
    def dtypes(self) -> dict[str, Any]:
        """Type of each parameter by path."""
        return {path: dtype_of(each) for path, each in zip(self.shapes, self.program.jaxpr.invars, strict=False)}


def trace(function: Callable[..., Any], params: Any, *inputs: Any) -> Traced:
    """Read the coupled structures off `function(params, *inputs)`.

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
        ValueError: `params` holds no arrays, or arrays have explicit axes.
    """
    refuse_explicit_axes((params, inputs))
    paths = list(by_path(params))
    if not paths:
        raise ValueError(f"params: expected a pytree of arrays or jax.ShapeDtypeStructs, got {params!r}")
    program, results = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    program = alive(program)
    follower = Follower()
    axes = follower.notes.axes
    variables = list(map(shape_of, program.jaxpr.invars))
    shapes = dict(zip(paths, variables, strict=False))
    values = [Value(tuple(map(axes.atom, shape)), False, None, Moved(path)) for path, shape in shapes.items()]
    for shape in variables[len(paths) :]:
        values.append(Value(tuple(axes.pinned(size, "input", "") for size in shape), True))
    last = follower.run(program, values)
    axes.site = None
    for result in follower.plain(last, ()):
        for node in result.layout:
            axes.pin(node, "output", "")
    layouts = {path: value.layout for path, value in zip(paths, values, strict=False)}
    structures = []
    atoms = {}
    for coupling in _collect(follower, layouts):
        structure = _structure(follower, layouts, coupling)
        number = 1
        name = structure.name
        while name in atoms:  # another structure whose first member is the same axis
            number += 1
            name = f"{structure.name}.{number}"
        structures.append(dataclasses.replace(structure, name=name))
        atoms[name] = coupling.atom
    unknown = tuple(f"{name} at {site.place}" for name, site in follower.notes.unknown)
    return Traced(tuple(structures), unknown, shapes, program, results, follower, atoms, layouts)


def by_path(params: Any) -> dict[str, Any]:
    """Key each array of a pytree by its path, in order; that of an `nnx.Variable` by the variable's."""
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
    return dict(zip(paths, jax.tree.leaves(params), strict=True))


# --- from atoms to structures ------------------------------------------------------------------------


@dataclasses.dataclass
class Coupling:
    """An atom that lies in parameters, and what concerns it."""

    atom: int
    holders: list[str] = dataclasses.field(default_factory=list)
    """Paths of the parameters in which it lies."""
    pins: list[Pin] = dataclasses.field(default_factory=list)
    contractions: list[Acting] = dataclasses.field(default_factory=list)
    reductions: list[Acting] = dataclasses.field(default_factory=list)
    companions: frozenset[int] = frozenset()
    """Atoms that stand beside this one wherever it occurs: its units may be chosen anew at each of their indices."""
    role: str = "channels"
    """What its units are to a reader; see `_name_roles`."""


def _collect(follower: Follower, layouts: dict[str, Layout]) -> list[Coupling]:
    """Gather what concerns each atom of a followed program, in the order in which the parameters name them."""
    notes, axes = follower.notes, follower.notes.axes
    found: dict[int, Coupling] = {}
    for path, layout in layouts.items():
        for atom in dict.fromkeys(atom for node in layout for atom in axes.atoms(node)):
            if axes.size(atom) and atom != ONE:
                found.setdefault(atom, Coupling(atom)).holders.append(path)
    for cut, site in notes.splits:  # after removing a unit of a part, the code would cut at other places
        axes.site = site
        parts = [part for part in cut if axes.size(part)]
        sizes = [axes.size(part) for part in parts]
        for atom in {atom for part in parts for atom in axes.atoms(part)}:
            lost = [axes.drop(part, atom) for part in parts]
            if any(gone * sizes[0] != lost[0] * size for gone, size in zip(lost, sizes, strict=True)):
                axes.pin(atom, "split", "unevenly")
    for field, records in (("pins", axes.pins), ("contractions", notes.contractions), ("reductions", notes.reductions)):
        for record in records:
            for atom in set(axes.atoms(record.node)) & found.keys():
                getattr(found[atom], field).append(record)
    for coupling in found.values():
        if not (coupling.pins or coupling.contractions or coupling.reductions):
            coupling.pins.append(Pin(coupling.atom, "unused", "", None))
    _find_companions(follower, layouts, found)
    _name_roles(follower, found)
    return list(found.values())


def _name_roles(follower: Follower, found: dict[int, Coupling]) -> None:
    """Say what units are, for readers: heads, query heads, widths of heads, experts, a stream, or channels.

    Experts are what a `top_k` or `argmax` chooses from. Heads are what two activations have in common in a product that
    contracts something else (query and key); what is contracted there, or stands beside heads where it is contracted,
    is a head's width, unless it reaches an input, as the places of a sequence do. What a product has in common of an
    activation and a parameter, and is no head, is experts too. Query heads are left over where a head's width is
    contracted. A stream is a sum of activations that several layers read, or averaged by a norm.
    """
    axes = follower.notes.axes
    notes = follower.notes
    roles: dict[int, set[str]] = {}
    inputs = {atom for pin in axes.pins if pin.kind == "input" for atom in axes.atoms(pin.node)}
    for node, role in notes.paired:
        for atom in axes.atoms(node) if role != "head width" or not inputs & {*axes.atoms(node)} else ():
            roles.setdefault(atom, set()).add(role)
    experts = {atom for record in notes.reductions if record.least for atom in axes.atoms(record.node)}
    heads = {atom for atom, held in roles.items() if "heads" in held and atom in found} - experts
    experts |= {atom for atom, held in roles.items() if "experts" in held} - heads
    widths = {atom for atom, held in roles.items() if "head width" in held and atom in found}
    projections = {path for atom in heads for path in found[atom].holders}
    if heads:  # of the places of a sequence and widths, those that are projected as the heads are
        widths = {atom for atom in widths if projections & set(found[atom].holders)}
    queries: set[int] = set()
    for contracted, free in notes.scores:
        if {atom for node in contracted for atom in axes.atoms(node)} & widths:
            queries |= {atom for node in free for atom in axes.atoms(node)}
    added = {atom for node in notes.added for atom in axes.atoms(node)}
    for atom, coupling in found.items():
        sites = {record.site.path for record in coupling.contractions}
        beside = [{each for node in record.layout for each in axes.atoms(node)} for record in coupling.contractions]
        if atom in experts:
            coupling.role = "experts"
        elif atom in heads:
            coupling.role = "heads"
        elif atom in queries - widths:
            coupling.role = "query heads"
        elif atom in widths or (beside and all(atoms & heads for atoms in beside)):
            coupling.role = "head width"
        elif coupling.reductions or (atom in added and len(sites) > 1):
            coupling.role = "stream"


def _find_companions(follower: Follower, layouts: dict[str, Layout], found: dict[int, Coupling]) -> None:
    """Intersect the atoms that share a layout, or surround it as a loop's axis, over all layouts of the program.

    Along an atom whose indices meet each other (it is reordered, or two axes of one array or of the loops around it) no
    unit is chosen anew.
    """
    axes = follower.notes.axes
    moved = {atom for node in follower.notes.moved for atom in axes.atoms(node)}
    moved |= {atom for old, new in follower.notes.shifts for atom in {*axes.atoms(old)} & {*axes.atoms(new)}}
    beside: dict[int, frozenset[int]] = {}
    resolved: dict[tuple[frozenset[int], frozenset[int]], None] = {}
    for layout, loops in follower.seen:
        atoms = [atom for node in (*layout, *loops) for atom in axes.atoms(node)]
        if len(set(atoms)) < len(atoms):  # values at one of its indices meet those at another
            moved |= {atom for atom in atoms if atoms.count(atom) > 1}
        roots = frozenset(map(axes.find, layout))
        resolved[roots, roots | frozenset(map(axes.find, loops))] = None
    for roots, around in resolved:
        for atom in {atom for root in roots for atom in axes.atoms(root)} & found.keys():
            others = around - {atom}
            beside[atom] = beside[atom] & others if atom in beside else others
    for atom, others in beside.items():
        whole = {other for other in others if other in found and other not in moved}
        for path in found[atom].holders:
            whole &= {axes.find(node) for node in layouts[path]}
        if found[atom].pins:
            found[atom].companions = frozenset()
        else:
            found[atom].companions = frozenset(whole)
    for atom, coupling in found.items():  # two axes that go together everywhere: units of neither are chosen along both
        mutual = {other for other in coupling.companions if atom in found[other].companions}
        for other in mutual:
            found[other].companions -= {atom}
        coupling.companions -= mutual


def _structure(follower: Follower, layouts: dict[str, Layout], coupling: Coupling) -> TracedStructure:
    axes = follower.notes.axes
    atom = coupling.atom
    copied = sorted(coupling.companions)
    members = []
    removed = 0
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

    def gate(found: Acting) -> Gate:
        scans = [site.path for site in found.site.above if site.path in follower.lengths]
        around = {axes.find(follower.lengths[path]): path for path in scans}
        roots = [axes.find(node) for node in found.layout]
        along = tuple(roots.index(companion) if companion in roots else around[companion] for companion in copied)
        places = axes.places(found.node, atom)
        neutral = NEUTRAL.get(found.operation)
        return Gate(found.site.path, found.operand, found.axis, places, along, str(found.site), neutral)

    changing = [each for each in coupling.reductions if each.operation in NEUTRAL and not coupling.pins]
    reasons = {Reason(pin.kind, pin.detail, pin.site.place if pin.site else ""): None for pin in coupling.pins}
    sizes = tuple(map(axes.size, copied))
    return TracedStructure(
        name=f"{members[0].path}[{members[0].axis}]",
        units=axes.size(atom),
        copied=sizes,
        members=tuple(members),
        parameters_per_unit=removed // math.prod(sizes),
        pinned=tuple(reasons),
        normalised=tuple(str(each.site) for each in coupling.reductions),
        gates=tuple(dict.fromkeys(map(gate, coupling.contractions))),
        statistics=tuple(dict.fromkeys(map(gate, changing))),
        role=coupling.role,
        least=max((each.least for each in coupling.reductions), default=0),
    )


# --- names of structures -----------------------------------------------------------------------------


def group_of(name: str) -> str:
    """Put `*` for each number of the path in a structure's name; equal layers have one.

    >>> group_of("layers/11/mlp/up[1].2")
    'layers/*/mlp/up[1].2'
    """
    path, bracket, rest = name.partition("[")
    return re.sub(r"\d+", "*", path) + bracket + rest


def groups_of(structures: Sequence[TracedStructure]) -> dict[str, list[TracedStructure]]:
    """Group structures that are alike but for numbers in the paths of their members, by their names' pattern."""
    found: dict[Any, list[TracedStructure]] = {}
    for each in structures:
        members = tuple((group_of(m.path), m.axis, m.places, m.shared) for m in each.members)
        key = (group_of(each.name), each.units, each.copied, each.prunable, each.normalised == (), len(each.gates))
        found.setdefault((key, tuple(dict.fromkeys(members))), []).append(each)
    named: dict[str, list[TracedStructure]] = {}
    for group in found.values():
        if len(group) > 1:
            name = group_of(group[0].name)
        else:
            name = group[0].name
        taken = any(name == other or (name in other and len(group) > 1) for other in named)
        named[f"{name} ({group[0].name})" if taken else name] = group
    return named


def by_name(
    field: str, given: Mapping[str, T], names: Sequence[str], hints: Mapping[str, Any] | None = None
) -> dict[str, T]:
    """Tell what is asked for each name, by names and by patterns with `*` and `?`; brackets mean themselves.

    Of two patterns that fit one name, the later holds, but a name goes first.

    >>> by_name("min_keep", {"a/0/w[1]": 3, "a/*": 1}, ["a/0/w[1]", "a/1/w[1]"])
    {'a/0/w[1]': 3, 'a/1/w[1]': 1}

    Raises:
        ValueError: a pattern that fits no name.
    """
    found: dict[str, T] = {}
    for pattern, value in sorted(given.items(), key=lambda item: item[0] in names):
        if pattern in names:
            fitting = [pattern]
        else:
            fitting = fnmatch.filter(names, pattern.replace("[", "[[]"))
        if not fitting:
            hint = ""
            if hints and pattern in hints:
                hint = f"; {pattern} {hints[pattern]}"
            raise ValueError(
                f"{field}: expected names of structures {', '.join(names)}, or patterns of them, got {pattern}{hint}"
            )
        found.update(dict.fromkeys(fitting, value))
    return found
