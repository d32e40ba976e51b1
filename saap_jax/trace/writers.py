"""Where a structure's units act, and the matrices that carry them onward.

In an MLP that is the down projection, of heads the output projection. Such a writer is a set of systems, one for each
turn of the scans that deal out its parameter and for each index of the product's batch axes (experts): rows of
activations a `[rows, coordinates]` times a matrix W `[coordinates, out]`. Coordinates are what is summed over; of a
convolution, the channels of a window. Where units meet something else (a query meets keys) or are only summed, there
are rows and no matrix.

A parameter that is only moved before a product (reshaped, transposed, cut into parts, dealt out to a scan) takes part
in it as it is: a number at a place of the product's operand can be written back into the parameter. A conversion
between types of floating point counts as a move.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Bool, Float, Int, Shaped

from saap_jax.trace.interpret import Path, Tap, units_along
from saap_jax.trace.jaxpr import CALLS, called_program, dtype_of, opened, scan_split, shape_of
from saap_jax.trace.trace import Gate, Traced, TracedStructure

# --- parameters on their way -----------------------------------------------------------------------

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
        dtype = np.int32 if size <= np.iinfo(np.int32).max else np.uint32
        value = jnp.asarray(np.arange(size, dtype=dtype).reshape(shape))
        for step in self.steps:
            value = step(value)
        return np.asarray(value)


def parameter_uses(program: ClosedJaxpr, paths: Sequence[str]) -> dict[Tap, Moved]:
    """Find the operands at which parameters, the first inputs of a program, are used as they are.

    What a branch or a `while` loop is given counts as used there, whatever happens inside.
    """
    uses: dict[Tap, Moved] = {}

    def follow(jaxpr: Jaxpr, inputs: Sequence[Moved | None], path: Path) -> list[Moved | None]:
        known: dict[Any, Moved | None] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Moved | None:
            return None if isinstance(atom, Literal) else known.get(atom)

        for number, eqn in enumerate(jaxpr.eqns):
            here, values = (*path, number), [read(atom) for atom in eqn.invars]
            results: Sequence[Moved | None] = [None] * len(eqn.outvars)
            if eqn.primitive.name in CALLS:
                results = follow(opened(called_program(eqn))[0], values, (*here, 0))
            elif eqn.primitive.name == "scan":
                first, last = scan_split(eqn)
                rows = [each and dataclasses.replace(each, loops=(*each.loops, here)) for each in values[last:]]
                carry = [None] * (last - first)
                ends = follow(opened(eqn.params["jaxpr"])[0], [*values[:first], *carry, *rows], (*here, 0))
                uses.update({(here, first + i): each for i, each in enumerate(values[first:last]) if each})
                uses.update({(here, -1 - i): each for i, each in enumerate(ends) if each})
            elif any(values) and _only_moves(eqn):
                results = values if eqn.primitive.name in SAME else _after(eqn, values)
            else:
                uses.update({(here, i): each for i, each in enumerate(values) if each})
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    rest = [None] * (len(program.jaxpr.invars) - len(paths))
    results = follow(program.jaxpr, [*map(Moved, paths), *rest], ())
    return uses | {((), i): each for i, each in enumerate(results) if each}


def _only_moves(eqn: JaxprEqn) -> bool:
    """Say whether an equation does nothing but move its operands."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        return all(jnp.issubdtype(dtype_of(each), jnp.floating) for each in (eqn.invars[0], eqn.outvars[0]))
    return name in SAME or (name in MOVES and len(eqn.invars) == 1)


def _after(eqn: JaxprEqn, values: Sequence[Moved | None]) -> list[Moved]:
    """Add a move to the steps of what it moves, for each of its results."""
    (moved,) = values
    assert moved is not None
    parameters = eqn.primitive.get_bind_params(eqn.params)

    def step(number: int) -> Callable[[Array], Array]:
        def bound(value: Array) -> Array:
            results = eqn.primitive.bind(value, **parameters)
            return results[number] if eqn.primitive.multiple_results else results

        for _ in moved.loops:
            bound = jax.vmap(bound)
        return bound

    return [dataclasses.replace(moved, steps=(*moved.steps, step(number))) for number in range(len(eqn.outvars))]


# --- contractions ----------------------------------------------------------------------------------


def _blocks(values: Any, *groups: Sequence[int]) -> Any:
    """Merge the axes of an array, of numpy or jax, group by group."""
    moved = values.transpose([axis for group in groups for axis in group])
    return moved.reshape([math.prod(values.shape[axis] for axis in group) for group in groups])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Contraction:
    """A place where units of structures are summed over."""

    equation: Path
    operand: int
    """That of the activations."""
    where: str
    eqn: JaxprEqn
    copied: tuple[int, ...]
    """Of a sum: axes that number copies."""
    scans: Mapping[Path, JaxprEqn]
    """Around it, the outermost first."""
    loops: tuple[Path, ...]
    """Those of them of which each turn is a system of its own."""
    units: Mapping[str, Int[np.ndarray, "systems coordinates"]]
    """By structure that acts there: which unit of which copy a coordinate belongs to, flat; -1: none."""

    @property
    def is_convolution(self) -> bool:
        """Whether rows are windows."""
        return self.eqn.primitive.name == "conv_general_dilated"

    @property
    def tap(self) -> Tap:
        """Where its activations stand."""
        return self.equation, self.operand

    @property
    def partner(self) -> Tap | None:
        """Where that stands which they are multiplied with; None of a sum."""
        return None if self.eqn.primitive.name == "reduce_sum" else (self.equation, 1 - self.operand)

    @property
    def systems(self) -> int:
        """How many systems there are."""
        return len(next(iter(self.units.values())))

    @functools.cached_property
    def turns(self) -> list[tuple[int, ...]]:
        """The turns of `loops`, in the order of the systems."""
        return list(np.ndindex(*(int(self.scans[loop].params["length"]) for loop in self.loops)))

    def turn(self, system: int) -> tuple[int, ...]:
        """Make a key by which systems are applied one after the other: the place, with the turn of each scan."""
        turns = dict(zip(self.loops, self.turns[system // (self.systems // len(self.turns))], strict=True))
        key: list[int] = []
        for depth, number in enumerate(self.equation):
            key.append(number)
            if (scan := self.equation[: depth + 1]) in turns:
                key.append(int(turns[scan]) * (-1 if self.scans[scan].params["reverse"] else 1))
        return tuple(key)

    def rows(self, active: Float[Array, "..."]) -> Float[Array, "systems rows coordinates"]:
        """Arrange the activations of one example, `[*turns of the scans, *operand]`, as rows of each system."""
        if not self.is_convolution:
            return self._by_system(active, *self.axes(self.operand))
        patches = self._patches
        for _ in self.scans:
            patches = jax.vmap(patches)
        return self._by_system(patches(active), (), (1,), (0,))

    def partner_rows(self, values: Float[Array, "..."]) -> Float[Array, "systems rows coordinates"]:
        """Arrange what they are multiplied with in the same way."""
        return self._by_system(values, *self.axes(1 - self.operand))

    def _by_system(self, values: Any, batch: Sequence[int], contracted: Sequence[int], free: Sequence[int]) -> Any:
        """Arrange an array of all turns by the axes that each turn has."""
        own = [i for i, scan in enumerate(self.scans) if scan in self.loops]
        others = [i for i, scan in enumerate(self.scans) if scan not in self.loops]
        batch, contracted, free = ([len(self.scans) + axis for axis in axes] for axes in (batch, contracted, free))
        return _blocks(values, (*own, *batch), (*others, *free), contracted)

    def axes(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tell the batch, contracted and other axes of an operand."""
        name, parameters = self.eqn.primitive.name, self.eqn.params
        if name == "reduce_sum":
            batch, contracted = self.copied, tuple(map(int, parameters["axes"]))
        elif name == "conv_general_dilated":
            spec = parameters["dimension_numbers"].rhs_spec
            batch, contracted = (), (spec[1], *spec[2:]) if operand else parameters["dimension_numbers"].lhs_spec[1:2]
        else:
            contracted, batch = (tuple(map(int, each[operand])) for each in parameters["dimension_numbers"])
        axes = range(len(shape_of(self.eqn.invars[operand])))
        return batch, contracted, tuple(axis for axis in axes if axis not in {*batch, *contracted})

    def _patches(self, images: Float[Array, "..."]) -> Float[Array, "rows coordinates"]:
        """Cut images into windows."""
        numbers, parameters = self.eqn.params["dimension_numbers"], self.eqn.params
        kernel = shape_of(self.eqn.invars[1])
        found = jax.lax.conv_general_dilated_patches(
            jnp.transpose(images, numbers.lhs_spec),
            [kernel[axis] for axis in numbers.rhs_spec[2:]],
            parameters["window_strides"],
            parameters["padding"],
            parameters["lhs_dilation"],
            parameters["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.moveaxis(found, 1, -1).reshape(-1, found.shape[1])

    def kept(self, keep: Mapping[str, Bool[np.ndarray, "copies units"]]) -> Bool[np.ndarray, "systems coordinates"]:
        """Tell which coordinates belong to units that are kept, or to none."""
        kept = np.ones(next(iter(self.units.values())).shape, bool)
        for name, units in self.units.items():
            if name in keep:
                kept &= np.where(units >= 0, np.ravel(keep[name])[units], True)
        return kept

    def places(self, structure: TracedStructure) -> Int[np.ndarray, "copies units coordinates"]:
        """Find the coordinates of each unit among those of all systems, flat."""
        numbers = np.ravel(self.units[structure.name])
        order = np.argsort(numbers, kind="stable")[np.count_nonzero(numbers < 0) :]
        return order.reshape(structure.copies, structure.units, -1)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Writer(Contraction):
    """One that is a product with a parameter which was only moved on its way there."""

    path: str
    """The parameter."""
    index: Shaped[np.ndarray, "systems coordinates out"]
    """Where each number of the matrices lies in the parameter, flat."""
    shared: str
    """Why the matrix is not the product's alone, "" where it is."""

    def matrices(self, value: Array | np.ndarray) -> Float[Array, "systems coordinates out"]:
        """Take the matrices out of the parameter."""
        return jnp.take(jnp.ravel(jnp.asarray(value)), self.index, mode="clip")

    def replaced(
        self, value: Array | np.ndarray, system: int, matrix: Float[np.ndarray, "coordinates out"]
    ) -> np.ndarray:
        """Write another matrix of one system into the parameter, in its own type."""
        flat = np.array(value).ravel()
        flat[self.index[system]] = np.asarray(matrix).astype(flat.dtype)
        return flat.reshape(value.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Writers:
    """The writers of some structures, in the order of the program."""

    found: tuple[Writer, ...]
    others: tuple[Contraction, ...]
    """Where units of structures meet something else, or are only summed."""
    without: Mapping[str, str]
    """Why a structure has no writer, by name."""

    def of(self, structure: str) -> tuple[Writer, ...]:
        """Choose the writers of a structure."""
        return tuple(writer for writer in self.found if structure in writer.units)

    def acting(self, structure: str) -> tuple[Contraction, ...]:
        """Choose where the units of a structure act: its writers, or where there are none the other contractions."""
        return self.of(structure) or tuple(each for each in self.others if structure in each.units)


class _NoWriterError(Exception):
    """Why a place is no writer."""


def writers_of(traced: Traced, structures: Sequence[TracedStructure]) -> Writers:
    """Find the contractions at which the units of some structures act."""
    uses = parameter_uses(traced.program, list(traced.shapes))
    at_place: dict[Tap, dict[str, list[Gate]]] = {}
    by_name = {structure.name: structure for structure in structures}
    for structure in structures:
        for gate in structure.gates:
            at_place.setdefault((gate.equation, gate.operand), {}).setdefault(structure.name, []).append(gate)
    found: list[Writer] = []
    others: list[Contraction] = []
    reasons: dict[str, str] = {}
    for tap, gates in sorted(at_place.items()):
        try:
            place = _contraction(traced.program, tap, gates)
            systems = _with_units(place, by_name, gates)
            try:
                found.append(_writer(traced, uses, place, by_name, gates))
            except _NoWriterError:
                others += [] if place.is_convolution else [systems]
                raise
        except _NoWriterError as failure:
            for name in gates:
                reasons.setdefault(name, f"{failure} at {gates[name][0].where}")
    held = {name for writer in found for name in writer.units}
    return Writers(tuple(found), tuple(others), {name: reasons[name] for name in by_name if name not in held})


def _contraction(program: ClosedJaxpr, tap: Tap, gates: Mapping[str, Sequence[Gate]]) -> Contraction:
    """Look up a contraction whose rows can be told, each turn of the scans around it a system."""
    equation, operand = tap
    jaxpr, scans = program.jaxpr, {}
    for depth in range(0, len(equation) - 1, 2):
        around, here = jaxpr.eqns[equation[depth]], equation[: depth + 1]
        if around.primitive.name == "scan":
            scans[here] = around
            jaxpr = opened(around.params["jaxpr"])[0]
        elif around.primitive.name in CALLS:
            jaxpr = opened(called_program(around))[0]
        else:
            raise _NoWriterError(f"its units act inside a {around.primitive.name}")
    eqn, copied = jaxpr.eqns[equation[-1]], ()
    if eqn.primitive.name == "reduce_sum":
        along = {axis for own in gates.values() for gate in own for axis in gate.along if isinstance(axis, int)}
        copied = tuple(sorted(along - {*eqn.params["axes"]}))
    elif eqn.primitive.name == "conv_general_dilated":
        if operand != 0 or eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
            raise _NoWriterError("its units meet a grouped convolution")
    elif eqn.primitive.name != "dot_general":
        raise _NoWriterError(f"its units are contracted by {eqn.primitive.name}")
    return Contraction(
        equation=equation,
        operand=operand,
        where=next(iter(gates.values()))[0].where,
        eqn=eqn,
        copied=copied,
        scans=scans,
        loops=tuple(scans),
        units={},
    )


def _with_units(
    place: Contraction, structures: Mapping[str, TracedStructure], gates: Mapping[str, Sequence[Gate]]
) -> Contraction:
    """Tell of a contraction which unit of which copy each coordinate belongs to."""
    shape, depth = shape_of(place.eqn.invars[place.operand]), len(place.scans)
    batch, contracted, free = place.axes(place.operand)
    told = [int(scan.params["length"]) for scan in place.scans.values()]
    told += [1 if axis in free else size for axis, size in enumerate(shape)]
    units = {}
    for name, (gate, *more) in gates.items():
        structure = structures[name]
        along, *twice = units_along(gate, shape[gate.axis], structure.units)
        if more or twice:
            raise _NoWriterError("a number belongs to two of its units")
        order = [*(list(place.scans).index(each) if isinstance(each, tuple) else depth + each for each in gate.along)]
        order.append(depth + gate.axis)
        if {axis - depth for axis in order} & {*free}:
            raise _NoWriterError("its copies are no systems")
        numbers = np.arange(structure.copies * structure.units).reshape(*structure.copied, structure.units)
        numbers = np.concatenate([numbers, np.full((*structure.copied, 1), -1)], -1)[..., along]
        numbers = numbers.transpose(np.argsort(order)).reshape([n if i in order else 1 for i, n in enumerate(told)])
        found = place._by_system(np.broadcast_to(numbers, told), batch, contracted, free)
        if (found != found[:, :1]).any():
            raise _NoWriterError("its copies are no systems")
        units[name] = found[:, 0]
        if place.is_convolution:
            window = shape_of(place.eqn.invars[1])
            spec = place.eqn.params["dimension_numbers"].rhs_spec
            units[name] = np.repeat(units[name], math.prod(window[axis] for axis in spec[2:]), axis=-1)
    return dataclasses.replace(place, units=units)


def _writer(
    traced: Traced,
    uses: Mapping[Tap, Moved],
    place: Contraction,
    structures: Mapping[str, TracedStructure],
    gates: Mapping[str, Sequence[Gate]],
) -> Writer:
    """Make a writer of a contraction that meets a parameter as it is."""
    if place.partner is None:
        raise _NoWriterError("its units are summed by reduce_sum")
    moved = uses.get(place.partner)
    if moved is None:
        raise _NoWriterError("its units meet no parameter as it is")
    if not jnp.issubdtype(traced.dtypes[moved.path], jnp.floating):
        raise _NoWriterError(f"its units meet integers, {moved.path},")
    shape, depth = traced.shapes[moved.path], len(moved.loops)
    batch, contracted, free = ([depth + axis for axis in axes] for axes in place.axes(1 - place.operand))
    index, shared = _blocks(moved.index(shape), (*range(depth), *batch), contracted, free), ""
    own = np.zeros(math.prod(shape), bool)
    own[index.ravel()] = True
    if np.count_nonzero(own) != index.size:
        shared = f"numbers of {moved.path} are repeated on the way to {place.where}"
    for tap, use in uses.items():
        if tap != place.partner and use.path == moved.path and own[use.index(shape).ravel()].any():
            shared = f"{moved.path} is used elsewhere too, beside {place.where}"
    made = _with_units(dataclasses.replace(place, loops=moved.loops), structures, gates)
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    return Writer(**fields, path=moved.path, index=index, shared=shared)
