"""Where a structure's units act, and the matrices that carry them onward.

In an MLP that is the down projection, of heads the output projection. Such a writer is a set of systems, one for each
turn of the scans that deal out its parameter and for each index of the product's batch axes (experts): rows of
activations a `[rows, coordinates]` times a matrix W `[coordinates, out]`. Coordinates are what is summed over; of a
convolution, the channels of a window. Where units meet something else (a query meets keys) or are only summed, there
are rows and no matrix.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jaxtyping import Array, Bool, Float, Int, Shaped

from saap_jax.trace.interpret import units_along
from saap_jax.trace.jaxpr import CALLS, called_program, opened, shape_of
from saap_jax.trace.program import Path, Tap
from saap_jax.trace.trace import Gate, Traced, TracedStructure


def _blocks(values: Any, *groups: Sequence[int]) -> Any:
    """Merge the axes of an array, of numpy or jax, group by group."""
    moved = values.transpose([axis for group in groups for axis in group])
    return moved.reshape([math.prod(values.shape[axis] for axis in group) for group in groups])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Contraction:
    """A place where units of structures are summed over."""

    tap: Tap
    """Where its activations stand."""
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
    lying: Mapping[int, Sequence[tuple[str, Int[np.ndarray, "..."]]]] = dataclasses.field(default_factory=dict)
    """By operand: structures of which units lie in it, whether they act here or not, and which unit of which copy each
    number of it belongs to, as in `units`; axes of the scans around come first, axes that say nothing have size 1."""

    @property
    def is_convolution(self) -> bool:
        """Whether rows are windows."""
        return self.eqn.primitive.name == "conv_general_dilated"

    @property
    def partner(self) -> Tap | None:
        """Where that stands which they are multiplied with; None of a sum."""
        if self.eqn.primitive.name == "reduce_sum":
            return None
        return (self.tap[0], 1 - self.tap[1])

    @property
    def systems(self) -> int:
        """How many systems there are."""
        return len(next(iter(self.units.values())))

    def turn(self, system: int) -> tuple[int, ...]:
        """Make a key by which systems are applied one after the other: the place, with the turn of each scan."""
        lengths = [int(self.scans[loop].params["length"]) for loop in self.loops]
        turn = ()
        if lengths:
            turn = np.unravel_index(system // (self.systems // math.prod(lengths)), lengths)
        turns = dict(zip(self.loops, turn, strict=True))
        key = []
        for depth, number in enumerate(self.tap[0]):
            key.append(number)
            if (scan := self.tap[0][: depth + 1]) in turns:
                key.append(int(turns[scan]) * (-1 if self.scans[scan].params["reverse"] else 1))
        return tuple(key)

    def rows(self, active: Float[Array, "..."]) -> Float[Array, "systems rows coordinates"]:
        """Arrange the activations of one example, `[*turns of the scans, *operand]`, as rows of each system."""
        if not self.is_convolution:
            return self.by_system(active, *self.axes(self.tap[1]))
        numbers = self.eqn.params["dimension_numbers"]
        parameters = self.eqn.params
        kernel = shape_of(self.eqn.invars[1])

        def windows(images: Float[Array, "..."]) -> Float[Array, "rows coordinates"]:
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

        for _ in self.scans:
            windows = jax.vmap(windows)
        return self.by_system(windows(active), (), (1,), (0,))

    def by_system(self, values: Any, batch: Sequence[int], contracted: Sequence[int], free: Sequence[int]) -> Any:
        """Arrange an array of all turns by the axes that each turn has."""
        own = [i for i, scan in enumerate(self.scans) if scan in self.loops]
        others = [i for i, scan in enumerate(self.scans) if scan not in self.loops]
        batch, contracted, free = ([len(self.scans) + axis for axis in axes] for axes in (batch, contracted, free))
        return _blocks(values, (*own, *batch), (*others, *free), contracted)

    def axes(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tell the batch, contracted and other axes of an operand."""
        name = self.eqn.primitive.name
        parameters = self.eqn.params
        if name == "reduce_sum":
            batch = self.copied
            contracted = tuple(map(int, parameters["axes"]))
        elif name == "conv_general_dilated":
            spec = parameters["dimension_numbers"].rhs_spec
            batch = ()
            if operand:
                contracted = (spec[1], *spec[2:])
            else:
                contracted = parameters["dimension_numbers"].lhs_spec[1:2]
        else:
            contracted, batch = (tuple(map(int, each[operand])) for each in parameters["dimension_numbers"])
        axes = range(len(shape_of(self.eqn.invars[operand])))
        return batch, contracted, tuple(axis for axis in axes if axis not in {*batch, *contracted})

    def kept(self, keep: Mapping[str, Bool[np.ndarray, "copies units"]]) -> Bool[np.ndarray, "systems coordinates"]:
        """Tell which coordinates belong to units that are kept, or to none."""
        kept = np.ones(next(iter(self.units.values())).shape, bool)
        for name, units in self.units.items():
            if name in keep:
                kept &= np.where(units >= 0, np.ravel(keep[name])[units], True)
        return kept

    def there(
        self, gates: Mapping[str, Float[Array, "copies units"]], operand: int | None = None
    ) -> Bool[Array, "systems #rows coordinates"]:
        """Tell which numbers of the activations, or of another operand, belong to no unit whose gate is 0.

        Where it is the same for all rows, there is one row.
        """
        operand = self.tap[1] if operand is None else operand
        batch, contracted, free = self.axes(operand)
        sizes = [int(scan.params["length"]) for scan in self.scans.values()]
        sizes += shape_of(self.eqn.invars[operand])
        depth = len(self.scans)
        of_rows = [axis for axis, scan in enumerate(self.scans) if scan not in self.loops]
        of_rows += [depth + axis for axis in free]
        lying = self.lying[operand]
        if not any(numbers.shape[axis] > 1 for _, numbers in lying for axis in of_rows):
            sizes = [1 if axis in of_rows else size for axis, size in enumerate(sizes)]
        if self.is_convolution:  # rows are windows, on whose other axes no unit lies
            lying = self.units.items()
            sizes = next(iter(self.units.values())).shape
        found = jnp.ones(sizes, bool)
        for name, numbers in lying:
            padded = jnp.append(jnp.ravel(gates[name]), 1)  # the last one is of what belongs to no unit: -1
            found &= padded[numbers] != 0
        if self.is_convolution:
            return found[:, None]
        return self.by_system(found, batch, contracted, free)

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
    at_place: dict[Tap, dict[str, list[Gate]]] = {}
    for structure in structures:
        for gate in structure.gates:
            at_place.setdefault((gate.equation, gate.operand), {}).setdefault(structure.name, []).append(gate)
    by_name = {structure.name: structure for structure in structures}
    found: list[Writer] = []
    others: list[Contraction] = []
    reasons: dict[str, str] = {}
    for tap, gates in sorted(at_place.items()):
        try:
            place = _contraction(traced.program, tap, gates)
            own, reason = _parameter(traced, place)
            fields: dict[str, Any] = vars(place) | own
            fields["units"] = _units(dataclasses.replace(place, loops=fields["loops"]), by_name, gates)
            if own or place.partner is None:
                taps = [tap]
            else:
                taps = [tap, place.partner]
            fields["lying"] = {each[1]: _lying(traced, place, each, structures) for each in taps}
        except _NoWriterError as failure:
            reason = str(failure)
        else:
            if own:
                found.append(Writer(**fields))
            elif not place.is_convolution:
                others.append(Contraction(**fields))
        for name in gates if reason else ():
            reasons.setdefault(name, f"{reason} at {gates[name][0].where}")
    held = {name for writer in found for name in writer.units}
    return Writers(tuple(found), tuple(others), {name: reasons[name] for name in by_name if name not in held})


def _contraction(program: ClosedJaxpr, tap: Tap, gates: Mapping[str, Sequence[Gate]]) -> Contraction:
    """Look up a contraction whose rows can be told, each turn of the scans around it a system; without its units."""
    path = tap[0]
    jaxpr = program.jaxpr
    scans = {}
    for depth in range(0, len(path) - 1, 2):
        around = jaxpr.eqns[path[depth]]
        here = path[: depth + 1]
        if around.primitive.name == "scan":
            scans[here] = around
            jaxpr = opened(around.params["jaxpr"])[0]
        elif around.primitive.name in CALLS:
            jaxpr = opened(called_program(around))[0]
        else:
            raise _NoWriterError(f"its units act inside a {around.primitive.name}")
    eqn = jaxpr.eqns[path[-1]]
    copied = ()
    if eqn.primitive.name == "reduce_sum":
        along = {axis for own in gates.values() for gate in own for axis in gate.along if isinstance(axis, int)}
        copied = tuple(sorted(along - {*eqn.params["axes"]}))
    elif eqn.primitive.name == "conv_general_dilated":
        if tap[1] != 0 or eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
            raise _NoWriterError("its units meet a grouped convolution")
    elif eqn.primitive.name != "dot_general":
        raise _NoWriterError(f"its units are contracted by {eqn.primitive.name}")
    where = next(iter(gates.values()))[0].where
    return Contraction(tap=tap, where=where, eqn=eqn, copied=copied, scans=scans, loops=tuple(scans), units={})


def _parameter(traced: Traced, place: Contraction) -> tuple[dict[str, Any], str]:
    """Find what a writer has beyond a contraction: its loops, the parameter and where its numbers lie; or why none."""
    if place.partner is None:
        return {}, "its units are summed by reduce_sum"
    uses = traced.follower.uses
    moved = uses.get(place.partner)
    if moved is None:
        return {}, "its units meet no parameter as it is"
    if not jnp.issubdtype(traced.dtypes[moved.path], jnp.floating):
        return {}, f"its units meet integers, {moved.path},"
    shape = traced.shapes[moved.path]
    depth = len(moved.loops)
    batch, contracted, free = ([depth + axis for axis in axes] for axes in place.axes(1 - place.tap[1]))
    index = _blocks(moved.index(shape), (*range(depth), *batch), contracted, free)
    shared = ""
    own = np.zeros(math.prod(shape), bool)
    own[index.ravel()] = True
    if np.count_nonzero(own) != index.size:
        shared = f"numbers of {moved.path} are repeated on the way to {place.where}"
    for tap, use in uses.items():
        if tap != place.partner and use.path == moved.path and own[use.index(shape).ravel()].any():
            shared = f"{moved.path} is used elsewhere too, beside {place.where}"
    return {"loops": moved.loops, "path": moved.path, "index": index, "shared": shared}, ""


def _lying(
    traced: Traced, place: Contraction, tap: Tap, structures: Sequence[TracedStructure]
) -> list[tuple[str, Int[np.ndarray, "..."]]]:
    """Find the units that lie in an operand of a contraction: what `Contraction.lying` says of it."""
    axes = traced.follower.notes.axes
    follower = traced.follower
    layout = follower.operands[tap[0]][tap[1]]
    roots = [axes.find(node) for node in layout]
    around = {axes.find(follower.lengths[scan]): scan for scan in place.scans}
    found = []
    for structure in structures:
        member = structure.members[0]
        atom = traced.atoms[structure.name]
        # what numbers the copies stands beside the units wherever they are: in the array, or around it
        copies = [axes.find(traced.layouts[member.path][axis]) for axis in member.shared]
        for axis, node in enumerate(layout):
            if places := axes.places(node, atom):
                along = tuple(roots.index(each) if each in roots else around[each] for each in copies)
                gate = Gate(tap[0], tap[1], axis, places, along, place.where)
                found += [(structure.name, numbers) for numbers in _numbers(place, structure, gate)]
    return found


def _numbers(place: Contraction, structure: TracedStructure, gate: Gate) -> list[Int[np.ndarray, "..."]]:
    """Tell which unit of which copy each number of an operand belongs to; again where one belongs to two units.

    Axes of the scans around come first, axes along which it is the same have size 1.
    """
    shape = shape_of(place.eqn.invars[gate.operand])
    depth = len(place.scans)
    order = [*(list(place.scans).index(each) if isinstance(each, tuple) else depth + each for each in gate.along)]
    order.append(depth + gate.axis)
    flat = np.arange(structure.copies * structure.units).reshape(*structure.copied, structure.units)
    flat = np.concatenate([flat, np.full((*structure.copied, 1), -1)], -1)
    found = []
    for along in units_along(gate, shape[gate.axis], structure.units):
        numbers = flat[..., along]
        sizes = dict(zip(order, numbers.shape, strict=True))
        numbers = numbers.transpose(np.argsort(order))
        found.append(numbers.reshape([sizes.get(axis, 1) for axis in range(depth + len(shape))]))
    return found


def _units(
    place: Contraction, structures: Mapping[str, TracedStructure], gates: Mapping[str, Sequence[Gate]]
) -> dict[str, Int[np.ndarray, "systems coordinates"]]:
    """Tell which unit of which copy each coordinate of a contraction belongs to."""
    shape = shape_of(place.eqn.invars[place.tap[1]])
    depth = len(place.scans)
    batch, contracted, free = place.axes(place.tap[1])
    told = [int(scan.params["length"]) for scan in place.scans.values()]
    told += [1 if axis in free else size for axis, size in enumerate(shape)]
    units = {}
    for name, (gate, *more) in gates.items():
        numbers, *twice = _numbers(place, structures[name], gate)
        if more or twice:
            raise _NoWriterError("a number belongs to two of its units")
        if any(numbers.shape[depth + axis] > 1 for axis in free):
            raise _NoWriterError("its copies are no systems")
        found = place.by_system(np.broadcast_to(numbers, told), batch, contracted, free)
        if (found != found[:, :1]).any():
            raise _NoWriterError("its copies are no systems")
        units[name] = found[:, 0]
        if place.is_convolution:
            spec = place.eqn.params["dimension_numbers"].rhs_spec
            window = math.prod(shape_of(place.eqn.invars[1])[axis] for axis in spec[2:])
            units[name] = np.repeat(found[:, 0], window, -1)
    return units
