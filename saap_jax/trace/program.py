"""Follow the axes of arrays through a jaxpr and the programs inside it: calls, loops and branches.

Beside axes two things are followed. *Positions* along an axis (of `top_k`, `argmax`, `iota`) are renumbered when a unit
goes, which is right while they are only compared with each other. *Parameters* that are only moved (reshaped,
transposed, cut into parts, dealt out to a scan) are used as they are: a number at a place of an operand can be written
back into the parameter. A conversion between types of floating point counts as a move.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import Array, Int

from saap_jax.trace.axes import Pin
from saap_jax.trace.jaxpr import CALLS, called_program, dtype_of, opened, scan_split, shape_of
from saap_jax.trace.parts import PART_RULES
from saap_jax.trace.rules import RULES, Layout, Notes, unknown

Path = tuple[int, ...]
"""Where an equation stands: its index; inside a scan or call: that of the equation, of the program inside it, of the
equation in that."""
Tap = tuple[Path, int]
"""An equation and one of its operands."""

_PASSES = "broadcast_in_dim reshape squeeze transpose convert_element_type copy copy_p stop_gradient"
PASSES = frozenset(_PASSES.split())
"""Operations behind which positions are positions."""
MOVES = frozenset(["reshape", "transpose", "squeeze", "slice", "split", "rev", "broadcast_in_dim"])
"""Operations that give each number another place, leave some out, or repeat some."""
_SAME = "copy copy_p convert_element_type sharding_constraint layout_constraint optimization_barrier device_put"
SAME = frozenset(_SAME.split())
"""Operations that leave each number at its place."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """Numbers of a parameter at another place of the program."""

    path: str
    """The parameter."""
    loops: tuple[Path, ...] = ()
    """The scans whose turns number the first axes."""
    steps: tuple[Callable[[Array], Array], ...] = ()

    def index(self, shape: Sequence[int]) -> Int[np.ndarray, "..."]:
        """Find for each number there its flat index in the parameter, of a given shape."""
        size = math.prod(shape)
        if size <= np.iinfo(np.int32).max:
            dtype = np.int32
        else:
            dtype = np.uint32
        value = jnp.asarray(np.arange(size, dtype=dtype).reshape(shape))
        for step in self.steps:
            value = step(value)
        return np.asarray(value)

    def after(self, eqn: JaxprEqn, number: int) -> "Moved":
        """Add the move of an equation to result `number` of it."""
        parameters = eqn.primitive.get_bind_params(eqn.params)

        def step(value: Array) -> Array:
            results = eqn.primitive.bind(value, **parameters)
            if eqn.primitive.multiple_results:
                return results[number]
            return results

        for _ in self.loops:
            step = jax.vmap(step)
        return dataclasses.replace(self, steps=(*self.steps, step))


class Value(NamedTuple):
    """What is known of an array."""

    layout: Layout
    active: bool
    """Whether it depends on the inputs."""
    positions: Pin | None = None
    """Of positions along an axis: why that axis is pinned once they are used as numbers."""
    moved: Moved | None = None
    """Of a parameter that was moved at most."""


class Equation(NamedTuple):
    """An equation of a program: its index in its jaxpr, and the equation and number of the program that holds that."""

    number: int
    eqn: JaxprEqn
    parent: "Equation | None" = None
    branch: int = 0

    @property
    def above(self) -> "list[Equation]":
        """The equations that hold the programs around it, the innermost first."""
        if self.parent is None:
            return []
        return [self.parent, *self.parent.above]

    @property
    def path(self) -> Path:
        """Indices from the outermost program."""
        above = ()
        if self.parent is not None:
            above = (*self.parent.path, self.branch)
        return (*above, self.number)

    def __str__(self) -> str:
        """Name the equations with their indices, outermost first, such as `scan[18]/dot_general[14]`."""
        above = "" if self.parent is None else f"{self.parent}/"
        return f"{above}{self.eqn.primitive.name}[{self.number}]"

    @property
    def place(self) -> str:
        """The equation as `str` gives it, and where its source stands, if known."""
        if self.source:
            return f"{self} ({self.source})"
        return str(self)

    @property
    def source(self) -> str:
        """The file's name, the line and the function that the equation (or what calls it) was traced from, if known."""
        name, colon, rest = source_info_util.summarize(self.eqn.source_info).partition(":")
        if not colon:
            if self.parent is None:
                return ""
            return self.parent.source
        return File(name).name + colon + rest


class Follower:
    """Evaluates a jaxpr on layouts instead of arrays."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.seen: dict[tuple[Layout, tuple[int, ...]], None] = {}
        """Each layout that occurred in the program, and the loop axes that it lies within."""
        self.lengths: dict[Path, int] = {}
        """The node of the axis that each scan runs over, by the path of its equation."""
        self.layouts: dict[Path, tuple[Layout, ...]] = {}
        """The layouts of the results of each equation, by its path."""
        self.operands: dict[Path, tuple[Layout, ...]] = {}
        """The layouts of the operands of each equation, by its path."""
        self.uses: dict[Tap, Moved] = {}
        """The operands at which parameters are used as they are; what a branch or a `while` loop is given, and a
        scan's carry, counts as used there, whatever happens inside."""

    def constant(self, value: Any) -> Value:
        """Lay out an array that is neither parameter nor input: each axis keeps its size."""
        shape = tuple(getattr(value, "shape", ()))
        detail = f"an array of shape {shape}"
        made = Value(tuple(self.notes.axes.pinned(int(size), "constant", detail) for size in shape), False)
        self.seen[made.layout, ()] = None
        return made

    def run(
        self, program: Any, inputs: Sequence[Value], parent: Equation | None = None, branch: int = 0
    ) -> list[Value]:
        """Follow a program, inside an equation or not, to its results."""
        notes = self.notes
        (jaxpr, constants) = opened(program)
        around = [parent, *parent.above] if parent else []
        loops = tuple(self.lengths[site.path] for site in around[::-1] if site.path in self.lengths)
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {each: self.constant(value) for each, value in zip(jaxpr.constvars, constants, strict=True)}
        for value in inputs:
            self.seen[value.layout, loops] = None

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return self.constant(atom.val)
            return known[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            site = notes.axes.site = Equation(index, eqn, parent, branch)
            values = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            self.operands[site.path] = tuple(value.layout for value in values)
            if name in INNER:
                results = INNER[name](self, site, values)
            else:
                notes.active = tuple(value.active for value in values)
                notes.numbering = {}
                rule = RULES.get(name) or PART_RULES.get(name) or unknown
                layouts = rule(notes, eqn, [value.layout for value in values])
                passed = self._positions(eqn, values)
                moved = self._moved(site, values)
                results = [
                    Value(tuple(layout), any(notes.active), notes.numbering.get(number, passed), moved[number])
                    for number, layout in enumerate(layouts)
                ]
            self.layouts[site.path] = tuple(value.layout for value in results)
            for variable, value in zip(eqn.outvars, results, strict=True):
                assert tuple(map(notes.axes.size, value.layout)) == shape_of(variable), (site, value)
                known[variable] = value
                self.seen[value.layout, loops] = None
        return [read(atom) for atom in jaxpr.outvars]

    def _positions(self, eqn: JaxprEqn, values: Sequence[Value]) -> Pin | None:
        """Follow positions: compared with others of the same axis, as `one_hot` does, they pin nothing."""
        axes = self.notes.axes
        name = eqn.primitive.name
        known = [value.positions for value in values]
        if name in PASSES:
            return known[0]
        nodes = [each.node for each in known if each]
        if name in ("eq", "ne") and len(nodes) == 2 and axes.size(nodes[0]) == axes.size(nodes[1]):
            axes.equate(nodes[0], nodes[1], "is numbered as another")
        else:
            axes.pins += [each for each in known if each]
        return None

    def _moved(self, site: Equation, values: Sequence[Value]) -> Sequence[Moved | None]:
        """Follow parameters that are only moved by an equation; otherwise they are used there."""
        eqn = site.eqn
        known = [value.moved for value in values]
        name = eqn.primitive.name
        nothing = [None] * len(eqn.outvars)
        if not any(known):
            return nothing
        floats = [jnp.issubdtype(dtype_of(each), jnp.floating) for each in (eqn.invars[0], eqn.outvars[0])]
        if name in SAME and (all(floats) or name != "convert_element_type"):
            return known
        if name in MOVES and len(known) == 1 and known[0]:
            return [known[0].after(eqn, number) for number in range(len(eqn.outvars))]
        self.uses |= {(site.path, i): each for i, each in enumerate(known) if each}
        return nothing

    def plain(self, values: Sequence[Value], path: Path, first: int = 0, by: int = 1) -> list[Value]:
        """Forget of values all but their axes: operands `first`, `first + by`, … of an equation, which uses them."""
        self.notes.axes.pins += [value.positions for value in values if value.positions]
        self.uses |= {(path, first + by * i): value.moved for i, value in enumerate(values) if value.moved}
        return [Value(value.layout, value.active) for value in values]

    def same(self, first: Sequence[Value], second: Sequence[Value]) -> list[Value]:
        """Equate the layouts of values that take each other's place."""
        return [
            Value(tuple(map(self.notes.equate, a.layout, b.layout)), a.active or b.active)
            for a, b in zip(first, second, strict=True)
        ]


def _call(follower: Follower, site: Equation, values: list[Value]) -> list[Value]:
    return follower.run(called_program(site.eqn), values, site)


def _scan(follower: Follower, site: Equation, values: list[Value]) -> list[Value]:
    parameters = site.eqn.params
    axes = follower.notes.axes
    path = site.path
    first, last = scan_split(site.eqn)
    active = any(value.active for value in values)
    carry = [value._replace(active=active) for value in follower.plain(values[first:last], path, first)]
    length = follower.lengths[path] = axes.atom(int(parameters["length"]))
    rows = []
    for value in values[last:]:
        axes.equate(length, value.layout[0], "stacked")
        own = value.moved and dataclasses.replace(value.moved, loops=(*value.moved.loops, path))
        rows.append(Value(value.layout[1:], value.active, None, own))
    axes.pin(length, "scan", f"of {parameters['length']} iterations")
    axes.pins += [value.positions for value in values[last:] if value.positions]
    ends = follower.run(parameters["jaxpr"], [*values[:first], *carry, *rows], site)
    results = follower.plain(ends, path, -1, -1)
    axes.site = site
    after = follower.same(carry, results[: len(carry)])
    return after + [Value((length, *value.layout), value.active) for value in results[len(carry) :]]


def _while(follower: Follower, site: Equation, values: list[Value]) -> list[Value]:
    parameters = site.eqn.params
    active = any(value.active for value in values)
    first = parameters["cond_nconsts"]
    last = first + parameters["body_nconsts"]
    values = follower.plain(values, site.path)
    carry = [value._replace(active=active) for value in values[last:]]
    follower.run(parameters["cond_jaxpr"], [*values[:first], *carry], site)
    results = follower.plain(follower.run(parameters["body_jaxpr"], [*values[first:last], *carry], site, 1), site.path)
    follower.notes.axes.site = site
    return follower.same(carry, results)


def _cond(follower: Follower, site: Equation, values: list[Value]) -> list[Value]:
    values = follower.plain(values, site.path)
    branches = [
        follower.plain(follower.run(program, values[1:], site, branch), site.path)
        for branch, program in enumerate(site.eqn.params["branches"])
    ]
    follower.notes.axes.site = site
    return functools.reduce(follower.same, branches)


INNER = {**dict.fromkeys(CALLS, _call), "scan": _scan, "while": _while, "cond": _cond}
