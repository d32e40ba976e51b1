"""Follow the axes of arrays through a jaxpr and the programs inside it: calls, loops and branches."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal

from saap_jax.trace.jaxpr import CALLS, called_program, opened, scan_split, shape_of
from saap_jax.trace.parts import PART_RULES
from saap_jax.trace.positions import Positions, follow, used
from saap_jax.trace.rules import RULES, Layout, Notes, unknown


class Value(NamedTuple):
    """What is known of an array: the node of each axis, whether it depends on the inputs, what its numbers are."""

    layout: Layout
    active: bool
    positions: Positions | None = None


class Site(NamedTuple):
    """An equation of a program: its index in its jaxpr, and the equation and number of the program that holds that."""

    number: int
    eqn: JaxprEqn
    parent: "Site | None" = None
    branch: int = 0

    @property
    def above(self) -> "list[Site]":
        """The equations that hold the programs around it, the innermost first."""
        return [] if self.parent is None else [self.parent, *self.parent.above]

    @property
    def path(self) -> tuple[int, ...]:
        """Indices from the outermost program: equation, then (program inside it, equation) for each level."""
        above = () if self.parent is None else (*self.parent.path, self.branch)
        return (*above, self.number)

    def __str__(self) -> str:
        """Name the equations with their indices, outermost first, such as `scan[18]/dot_general[14]`."""
        above = "" if self.parent is None else f"{self.parent}/"
        return f"{above}{self.eqn.primitive.name}[{self.number}]"

    @property
    def place(self) -> str:
        """The equation as `str` gives it, and where its source stands, if known."""
        return f"{self} ({self.source})" if self.source else str(self)

    @property
    def source(self) -> str:
        """The file's name, the line and the function that the equation (or what calls it) was traced from, if known."""
        file, colon, rest = source_info_util.summarize(self.eqn.source_info).partition(":")
        if not colon:
            return "" if self.parent is None else self.parent.source
        return Path(file).name + colon + rest


class Seen(NamedTuple):
    """A layout that occurred in the program, and the loop axes that it lies within."""

    layout: Layout
    loops: tuple[int, ...]


class Follower:
    """Evaluates a jaxpr on layouts instead of arrays."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.seen: dict[Seen, None] = {}
        self.lengths: dict[tuple[int, ...], int] = {}
        """The node of the axis that each scan runs over, by the path of its equation."""
        self.layouts: dict[tuple[int, ...], tuple[Layout, ...]] = {}
        """The layouts of the results of each equation, by its path."""

    def constant(self, value: Any) -> Value:
        """Lay out an array that is neither parameter nor input: each axis keeps its size."""
        shape = tuple(getattr(value, "shape", ()))
        detail = f"an array of shape {shape}"
        return Value(tuple(self.notes.axes.pinned(int(size), "constant", detail) for size in shape), False)

    def run(self, program: Any, inputs: Sequence[Value], parent: Site | None = None, branch: int = 0) -> list[Value]:
        """Follow a program, inside an equation or not, to its results."""
        notes, (jaxpr, constants) = self.notes, opened(program)
        around = [parent, *parent.above] if parent else []
        loops = tuple(self.lengths[site.path] for site in around[::-1] if site.path in self.lengths)
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {each: self.constant(value) for each, value in zip(jaxpr.constvars, constants, strict=True)}
        for value in inputs:
            self.seen[Seen(value.layout, loops)] = None

        def read(atom: Any) -> Value:
            if not isinstance(atom, Literal):
                return known[atom]
            zero = Positions("zero") if np.ndim(atom.val) == 0 and atom.val == 0 else None
            return self.constant(atom.val)._replace(positions=zero)

        for index, eqn in enumerate(jaxpr.eqns):
            site = notes.axes.site = Site(index, eqn, parent, branch)
            values, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
            if name in INNER:
                results = INNER[name](self, site, values)
            else:
                notes.active = tuple(value.active for value in values)
                notes.positions, notes.found = tuple(value.positions for value in values), {}
                rule = RULES.get(name) or PART_RULES.get(name) or unknown
                layouts = rule(notes, eqn, [value.layout for value in values])
                numbers = follow(notes.axes, notes.positions, eqn)
                results = [
                    Value(tuple(layout), any(notes.active), notes.found.get(number, numbers[number]))
                    for number, layout in enumerate(layouts)
                ]
            self.layouts[site.path] = tuple(value.layout for value in results)
            for variable, value in zip(eqn.outvars, results, strict=True):
                assert tuple(map(notes.axes.size, value.layout)) == shape_of(variable), (site, value)
                known[variable] = value
                self.seen[Seen(value.layout, loops)] = None
        return [read(atom) for atom in jaxpr.outvars]

    def plain(self, values: Sequence[Value]) -> list[Value]:
        """Forget of values all but their axes; those that are positions are used as numbers."""
        for value in values:
            used(self.notes.axes, value.positions)
        return [value._replace(positions=None) for value in values]

    def same(self, first: Sequence[Value], second: Sequence[Value]) -> list[Value]:
        """Equate the layouts of values that take each other's place."""
        return [
            Value(tuple(map(self.notes.equate, a.layout, b.layout)), a.active or b.active)
            for a, b in zip(first, second, strict=True)
        ]


def _call(follower: Follower, site: Site, values: list[Value]) -> list[Value]:
    return follower.run(called_program(site.eqn), values, site)


def _scan(follower: Follower, site: Site, values: list[Value]) -> list[Value]:
    parameters, axes = site.eqn.params, follower.notes.axes
    first, last = scan_split(site.eqn)
    constants, carry, stacked = values[:first], values[first:last], values[last:]
    active = any(value.active for value in values)
    carry = [value._replace(active=active) for value in follower.plain(carry)]
    stacked = follower.plain(stacked)
    length = follower.lengths[site.path] = axes.atom(int(parameters["length"]))
    for value in stacked:
        axes.equate(length, value.layout[0], "stacked")
    axes.pin(length, "scan", f"of {parameters['length']} iterations")
    rows = [Value(value.layout[1:], value.active) for value in stacked]
    results = follower.plain(follower.run(parameters["jaxpr"], [*constants, *carry, *rows], site))
    axes.site = site
    after = follower.same(carry, results[: len(carry)])
    return after + [Value((length, *value.layout), value.active) for value in results[len(carry) :]]


def _while(follower: Follower, site: Site, values: list[Value]) -> list[Value]:
    parameters = site.eqn.params
    first = parameters["cond_nconsts"]
    last = first + parameters["body_nconsts"]
    active = any(value.active for value in values)
    values = follower.plain(values)
    carry = [value._replace(active=active) for value in values[last:]]
    follower.run(parameters["cond_jaxpr"], [*values[:first], *carry], site)
    results = follower.plain(follower.run(parameters["body_jaxpr"], [*values[first:last], *carry], site, 1))
    follower.notes.axes.site = site
    return follower.same(carry, results)


def _cond(follower: Follower, site: Site, values: list[Value]) -> list[Value]:
    values = follower.plain(values)
    branches = [
        follower.plain(follower.run(program, values[1:], site, branch))
        for branch, program in enumerate(site.eqn.params["branches"])
    ]
    follower.notes.axes.site = site
    return functools.reduce(follower.same, branches)


INNER = {**dict.fromkeys(CALLS, _call), "scan": _scan, "while": _while, "cond": _cond}
