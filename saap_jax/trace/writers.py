"""Contractions in which a structure's gated activations meet a parameter: what carries its units onward.

In an MLP that is the down projection, of heads the output projection. Such a writer is a set of systems, one for each
turn of the scans that deal out its parameter and for each index of the product's batch axes (experts): rows of
activations a `[rows, coordinates]` times a matrix W `[coordinates, out]`. Coordinates are what is summed over; of a
convolution, the channels of a window. Where units meet something else (a query meets keys) or are only summed, there
are rows and no matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jaxtyping import Array, Bool, Float, Int, Shaped

from saap_jax.trace.interpret import Path, Tap
from saap_jax.trace.moved import Use, uses_of
from saap_jax.trace.nested import called_program, opened
from saap_jax.trace.program import CALLS
from saap_jax.trace.rules import dtype_of, shape_of
from saap_jax.trace.trace import Gate, Traced, TracedStructure


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the operands of a product are rows of activations and matrices."""

    eqn: JaxprEqn
    operand: int
    """The operand of the activations."""
    copied: tuple[int, ...] = ()
    """Of a sum: axes that number copies."""

    @property
    def is_convolution(self) -> bool:
        """Whether rows are windows."""
        return self.eqn.primitive.name == "conv_general_dilated"

    def axes(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the batch, contracted and other axes of an operand of a `dot_general` or a sum."""
        if self.eqn.primitive.name == "reduce_sum":
            summed = tuple(map(int, self.eqn.params["axes"]))
            axes = range(len(shape_of(self.eqn.invars[0])))
            return self.copied, summed, tuple(axis for axis in axes if axis not in {*self.copied, *summed})
        contracted, batch = self.eqn.params["dimension_numbers"]
        own, shared = tuple(map(int, contracted[operand])), tuple(map(int, batch[operand]))
        ndim = len(shape_of(self.eqn.invars[operand]))
        return shared, own, tuple(axis for axis in range(ndim) if axis not in {*own, *shared})

    def rows(self, active: Float[Array, "..."]) -> Float[Array, "batch rows coordinates"]:
        """Return the activations as rows."""
        if self.is_convolution:
            numbers, parameters = self.eqn.params["dimension_numbers"], self.eqn.params
            kernel = shape_of(self.eqn.invars[1])
            patches = jax.lax.conv_general_dilated_patches(
                jnp.transpose(active, numbers.lhs_spec),
                [kernel[axis] for axis in numbers.rhs_spec[2:]],
                parameters["window_strides"],
                parameters["padding"],
                parameters["lhs_dilation"],
                parameters["rhs_dilation"],
                precision=jax.lax.Precision.HIGHEST,
            )
            return jnp.moveaxis(patches, 1, -1).reshape(1, -1, patches.shape[1])
        batch, contracted, free = self.axes(self.operand)
        moved = jnp.transpose(active, (*batch, *free, *contracted))
        sizes = [math.prod(moved.shape[start:stop]) for start, stop in _spans(len(batch), len(free), len(contracted))]
        return moved.reshape(sizes)

    def matrices(self, kernel: Array) -> Shaped[Array, "batch coordinates out"]:
        """Return the other operand as matrices."""
        if self.is_convolution:
            spec = self.eqn.params["dimension_numbers"].rhs_spec
            moved = jnp.transpose(kernel, (spec[1], *spec[2:], spec[0]))
            return moved.reshape(1, -1, moved.shape[-1])
        batch, contracted, free = self.axes(1 - self.operand)
        moved = jnp.transpose(kernel, (*batch, *contracted, *free))
        sizes = [math.prod(moved.shape[start:stop]) for start, stop in _spans(len(batch), len(contracted), len(free))]
        return moved.reshape(sizes)

    def spread(self, values: Array) -> Array:
        """Return values `[batch, out]` at their places in the product's result, the same for all rows."""
        shape = shape_of(self.eqn.outvars[0])
        if self.is_convolution:
            feature = self.eqn.params["dimension_numbers"].out_spec[1]
            ones = [shape[feature] if axis == feature else 1 for axis in range(len(shape))]
            return jnp.broadcast_to(values.reshape(ones), shape)
        batch, _, rows = self.axes(self.operand)
        out = len(shape) - len(batch) - len(rows)
        ones = [*shape[: len(batch)], *[1] * len(rows), *shape[len(shape) - out :]]
        if self.operand == 1:
            ones = [*shape[: len(batch) + out], *[1] * len(rows)]
        return jnp.broadcast_to(values.reshape(ones), shape)


def _spans(*counts: int) -> list[tuple[int, int]]:
    """Return the bounds of stretches of given lengths, one behind the other.

    >>> _spans(1, 0, 2)
    [(0, 1), (1, 1), (1, 3)]
    """
    ends = np.cumsum(counts).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Carrier:
    """A parameter that is added to the results of a product and to nothing else: a bias."""

    path: str
    owner: Int[np.ndarray, "size"]
    """For each of its numbers, which of the outputs of all systems it is added to, flat; -1: none."""

    def raised(self, value: Array | np.ndarray, by: Float[np.ndarray, "systems out"]) -> np.ndarray:
        """Return the parameter with something added to each output, in its own type."""
        flat, at = np.asarray(value).ravel(), self.owner >= 0
        wide = flat.astype(np.float64)
        wide[at] += np.ravel(by)[self.owner[at]]
        return np.where(at, wide.astype(flat.dtype), flat).reshape(value.shape)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Contraction:
    """A place where units of structures are summed over."""

    equation: Path
    operand: int
    """That of the activations."""
    where: str
    geometry: Geometry
    scans: tuple[Path, ...]
    """Around it, the outermost first."""
    lengths: Mapping[Path, int]
    """Turns of each of them."""
    backwards: frozenset[Path]
    """Those of them that start at their last turn."""
    loops: tuple[Path, ...]
    """Those of them of which each turn is a system of its own."""
    units: Mapping[str, Int[np.ndarray, "systems coordinates"]]
    """By structure that acts there: which unit of which copy a coordinate belongs to, flat; -1: none."""

    @property
    def tap(self) -> Tap:
        """Where its activations stand."""
        return self.equation, self.operand

    @property
    def partner(self) -> Tap | None:
        """Where that stands which they are multiplied with; None of a sum."""
        return None if self.geometry.eqn.primitive.name == "reduce_sum" else (self.equation, 1 - self.operand)

    @property
    def systems(self) -> int:
        """How many systems there are."""
        return len(next(iter(self.units.values())))

    @functools.cached_property
    def turns(self) -> list[tuple[int, ...]]:
        """The turns of `loops`, in the order of the systems."""
        return list(np.ndindex(*(self.lengths[scan] for scan in self.loops)))

    def rows(self, active: Float[Array, "..."]) -> Float[Array, "systems rows coordinates"]:
        """Return the activations of one example, `[*turns of the scans, *operand]`, as rows of each system."""
        return self._by_system(self.geometry, active)

    def partner_rows(self, values: Float[Array, "..."]) -> Float[Array, "systems rows coordinates"]:
        """Return what they are multiplied with, in the same way."""
        return self._by_system(Geometry(self.geometry.eqn, 1 - self.operand), values)

    def _by_system(self, geometry: Geometry, values: Array) -> Array:
        each = geometry.rows
        for _ in self.scans:
            each = jax.vmap(each)
        found = each(values)
        own = [self.scans.index(scan) for scan in self.loops]
        others = [axis for axis in range(len(self.scans)) if axis not in own]
        batch, row, coordinate = range(len(self.scans), len(self.scans) + 3)
        ordered = jnp.transpose(found, (*own, batch, *others, row, coordinate))
        systems = len(self.turns) * found.shape[batch]
        return ordered.reshape(systems, -1, found.shape[-1])

    def kept(self, keep: Mapping[str, Bool[np.ndarray, "copies units"]]) -> Bool[np.ndarray, "systems coordinates"]:
        """Return which coordinates belong to units that are kept, or to none."""
        kept = np.ones(next(iter(self.units.values())).shape, bool)
        for name, units in self.units.items():
            if name in keep:
                kept &= np.where(units >= 0, np.ravel(keep[name])[units], True)
        return kept

    def places(self, structure: TracedStructure) -> Int[np.ndarray, "copies units coordinates"]:
        """Return where the coordinates of each unit lie among those of all systems, flat."""
        numbers = np.ravel(self.units[structure.name])
        order = np.argsort(numbers, kind="stable")[np.count_nonzero(numbers < 0) :]
        return order.reshape(structure.copies, structure.units, -1)

    def turn(self, system: int) -> tuple[int, ...]:
        """Return a key by which systems are applied one after the other: the place, with the turn of each scan."""
        batch = self.systems // len(self.turns)
        turns = dict(zip(self.loops, self.turns[system // batch], strict=True))
        key: list[int] = []
        for depth, number in enumerate(self.equation):
            key.append(number)
            if (scan := self.equation[: depth + 1]) in turns:
                key.append(int(turns[scan]) * (-1 if scan in self.backwards else 1))
        return tuple(key)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Writer(Contraction):
    """One that is a product with a parameter which was only moved on its way there."""

    path: str
    """The parameter."""
    index: Shaped[np.ndarray, "systems coordinates out"]
    """Where each number of the matrices lies in the parameter, flat."""
    shared: str
    """Why the matrix is not the product's alone, "" where it is."""
    carrier: Carrier | None
    """The bias behind it, if there is one."""

    def matrices(self, value: Array | np.ndarray) -> Float[Array, "systems coordinates out"]:
        """Return the parameter's numbers as matrices."""
        return jnp.take(jnp.ravel(jnp.asarray(value)), self.index, mode="clip")

    def replaced(
        self, value: Array | np.ndarray, system: int, matrix: Float[np.ndarray, "coordinates out"]
    ) -> np.ndarray:
        """Return the parameter with another matrix of one system, in its own type."""
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
        """Return the writers of a structure."""
        return tuple(writer for writer in self.found if structure in writer.units)

    def acting(self, structure: str) -> tuple[Contraction, ...]:
        """Return where the units of a structure act: its writers, or where there are none the other contractions."""
        return self.of(structure) or tuple(each for each in self.others if structure in each.units)


class _NoWriterError(Exception):
    """Why a place is no writer."""


@dataclasses.dataclass(frozen=True)
class _Placed:
    """An equation that was looked up in a program, and what surrounds it."""

    eqn: JaxprEqn
    scans: tuple[Path, ...]
    lengths: Mapping[Path, int]
    backwards: frozenset[Path]


def writers_of(traced: Traced, structures: Sequence[TracedStructure]) -> Writers:
    """Return the contractions with parameters at which the units of some structures act."""
    program = traced.program
    uses = uses_of(program, list(traced.shapes))
    at_place: dict[Tap, dict[str, list[Gate]]] = {}
    by_name = {structure.name: structure for structure in structures}
    for structure in structures:
        for gate in structure.gates:
            at_place.setdefault((gate.equation, gate.operand), {}).setdefault(structure.name, []).append(gate)
    found: list[Writer] = []
    others: list[Contraction] = []
    reasons: dict[str, str] = {}
    for (equation, operand), gates in sorted(at_place.items()):
        try:
            place = _contraction(traced.program, by_name, equation, operand, gates)
            try:
                found.append(_writer(traced, uses, place))
            except _NoWriterError:
                others += [] if place.geometry.is_convolution else [place]
                raise
        except _NoWriterError as failure:
            for name in gates:
                reasons.setdefault(name, f"{failure} at {gates[name][0].where}")
    held = {name for writer in found for name in writer.units}
    return Writers(tuple(found), tuple(others), {name: reasons[name] for name in by_name if name not in held})


def _contraction(
    program: ClosedJaxpr,
    structures: Mapping[str, TracedStructure],
    equation: Path,
    operand: int,
    gates: Mapping[str, Sequence[Gate]],
) -> Contraction:
    """Return the contraction at a place, each turn of the scans around it a system.

    Raises:
        _NoWriterError: there is none whose rows could be told.
    """
    placed = _find(program, equation)
    name, parameters = placed.eqn.primitive.name, placed.eqn.params
    copied: tuple[int, ...] = ()
    if name == "reduce_sum":
        along = [axis for own in gates.values() for gate in own for axis in gate.along if isinstance(axis, int)]
        copied = tuple(sorted({*along} - {*parameters["axes"]}))
    elif name == "conv_general_dilated":
        if operand != 0 or parameters["feature_group_count"] > 1 or parameters["batch_group_count"] > 1:
            raise _NoWriterError("its units meet a grouped convolution")
    elif name != "dot_general":
        raise _NoWriterError(f"its units are contracted by {name}")
    made = Contraction(
        equation=equation,
        operand=operand,
        where=next(iter(gates.values()))[0].where,
        geometry=Geometry(placed.eqn, operand, copied),
        scans=placed.scans,
        lengths=placed.lengths,
        backwards=placed.backwards,
        loops=placed.scans,
        units={},
    )
    return dataclasses.replace(made, units={n: _units(made, structures[n], each) for n, each in gates.items()})


def _writer(traced: Traced, uses: Sequence[Use], place: Contraction) -> Writer:
    """Return a contraction as a writer.

    Raises:
        _NoWriterError: it meets no parameter as it is.
    """
    if place.partner is None:
        raise _NoWriterError("its units are summed by reduce_sum")
    moved = next((use.moved for use in uses if (use.equation, use.operand) == place.partner), None)
    if moved is None or not isinstance(moved.source, str):
        raise _NoWriterError("its units meet no parameter as it is")
    path = moved.source
    if not jnp.issubdtype(_dtypes(traced)[path], jnp.floating):
        raise _NoWriterError(f"its units meet integers, {path},")
    shape = traced.shapes[path]
    matrices = place.geometry.matrices
    for _ in moved.loops:
        matrices = jax.vmap(matrices)
    numbers = np.asarray(matrices(jnp.asarray(moved.index(shape))))
    index, shared = numbers.reshape(-1, *numbers.shape[-2:]), ""
    own = np.zeros(math.prod(shape), bool)
    own[index.ravel()] = True
    if np.count_nonzero(own) != index.size:
        shared = f"numbers of {path} are repeated on the way to {place.where}"
    for use in uses:
        here = (use.equation, use.operand) == place.partner
        if use.moved.source == path and not here and own[use.moved.index(shape).ravel()].any():
            shared = f"{path} is used elsewhere too, beside {place.where}"
    fields = {field.name: getattr(place, field.name) for field in dataclasses.fields(place)}
    fields |= {"loops": moved.loops, "units": _of_loops(place, moved.loops)}
    made = Writer(**fields, path=path, index=index, shared=shared, carrier=None)
    return made if shared else dataclasses.replace(made, carrier=_carrier(traced, uses, made))


def _of_loops(place: Contraction, loops: tuple[Path, ...]) -> dict[str, Int[np.ndarray, "systems coordinates"]]:
    """Return the units of a place's coordinates where only some of the scans around it tell systems apart.

    Raises:
        _NoWriterError: another scan does so too.
    """
    sizes = [place.lengths[scan] for scan in place.scans]
    own = [place.scans.index(scan) for scan in loops]
    others = [axis for axis in range(len(sizes)) if axis not in own]
    found = {}
    for name, units in place.units.items():
        by_turn = units.reshape(*sizes, -1, units.shape[-1])
        ordered = np.transpose(by_turn, (*own, len(sizes), *others, len(sizes) + 1))
        ordered = ordered.reshape(math.prod(sizes[i] for i in own) * by_turn.shape[-2], -1, units.shape[-1])
        if (ordered != ordered[:, :1]).any():
            raise _NoWriterError("its copies are no systems")
        found[name] = ordered[:, 0]
    return found


def _dtypes(traced: Traced) -> dict[str, Any]:
    """Return the type of each parameter."""
    return {path: dtype_of(each) for path, each in zip(traced.shapes, traced.program.jaxpr.invars, strict=False)}


def _find(program: ClosedJaxpr, path: Path) -> _Placed:
    """Return the equation at a path.

    Raises:
        _NoWriterError: it lies in a branch, a `while` loop or `shard_map`.
    """
    jaxpr, scans, lengths, backwards = program.jaxpr, [], {}, set()
    for depth in range(0, len(path), 2):
        eqn = jaxpr.eqns[path[depth]]
        if depth + 1 == len(path):
            return _Placed(eqn, tuple(scans), lengths, frozenset(backwards))
        name, here = eqn.primitive.name, path[: depth + 1]
        if name == "scan":
            scans.append(here)
            lengths[here] = int(eqn.params["length"])
            backwards |= {here} if eqn.params["reverse"] else set()
            jaxpr = opened(eqn.params["jaxpr"])[0]
        elif name in CALLS:
            jaxpr = opened(called_program(eqn))[0]
        else:
            raise _NoWriterError(f"its units act inside a {name}")
    raise AssertionError(path)


def _units(
    place: Contraction, structure: TracedStructure, gates: Sequence[Gate]
) -> Int[np.ndarray, "systems coordinates"]:
    """Return which unit of which copy each coordinate belongs to.

    Raises:
        _NoWriterError: a coordinate belongs to two units, or a copy is no system.
    """
    geometry, gate, depth = place.geometry, gates[0], len(place.scans)
    shape = shape_of(geometry.eqn.invars[place.operand])
    unit = np.full(shape[gate.axis], -1)
    for each in gate.places:
        for number in range(structure.units):
            indices = each.indices(number)
            if len(gates) > 1 or (unit[indices] != -1).any():
                raise _NoWriterError("a number belongs to two of its units")
            unit[indices] = number
    axes = [depth + gate.axis]
    axes += [place.scans.index(each) if isinstance(each, tuple) else depth + each for each in gate.along]
    if geometry.is_convolution:
        feature = geometry.eqn.params["dimension_numbers"].lhs_spec[1]
        batch, contracted = (), (feature,)
    else:
        batch, contracted, _ = geometry.axes(place.operand)
    if any(axis >= depth and axis - depth not in {*batch, *contracted} for axis in axes):
        raise _NoWriterError("its copies are no systems")
    ndim, sizes = depth + len(shape), [place.lengths[scan] for scan in place.scans]

    def along(values: np.ndarray, axis: int) -> np.ndarray:
        return values.reshape([len(values) if axis == i else 1 for i in range(ndim)])

    copy = np.zeros([1] * ndim, np.int64)
    for size, axis in zip(structure.copied, axes[1:], strict=True):
        copy = copy * size + along(np.arange(size), axis)
    spread = along(unit, axes[0])
    numbers = np.where(spread >= 0, copy * structure.units + spread, -1)
    told = {*batch, *contracted}
    numbers = np.broadcast_to(numbers, [*sizes, *(size if axis in told else 1 for axis, size in enumerate(shape))])
    free = [axis for axis in range(len(shape)) if axis not in told]
    numbers = np.transpose(numbers, (*range(depth), *(depth + axis for axis in (*batch, *contracted, *free))))
    numbers = numbers.reshape(math.prod([*sizes, *(shape[axis] for axis in batch)]), -1)
    if geometry.is_convolution:
        window = shape_of(geometry.eqn.invars[1])
        spec = geometry.eqn.params["dimension_numbers"].rhs_spec
        numbers = np.repeat(numbers, math.prod(window[axis] for axis in spec[2:]), axis=-1)
    return numbers


def _carrier(traced: Traced, uses: Sequence[Use], writer: Writer) -> Carrier | None:
    """Return the bias that is added to a writer's result, if one is, to nothing else."""
    results = [use for use in uses if use.moved.source == writer.equation]
    if len(results) != 1 or results[0].eqn is None or results[0].eqn.primitive.name not in ("add", "add_any"):
        return None
    (result,) = results
    added = [use for use in uses if use.equation == result.equation and use.operand == 1 - result.operand]
    if not added or not isinstance(added[0].moved.source, str):
        return None
    moved, path = added[0].moved, added[0].moved.source
    loops = writer.loops
    if moved.loops != loops or result.moved.loops != loops or not jnp.issubdtype(_dtypes(traced)[path], jnp.floating):
        return None
    shape = traced.shapes[path]
    index = moved.index(shape)
    spread = writer.geometry.spread
    sizes = [writer.lengths[scan] for scan in loops]
    out = writer.index.shape[-1]
    for _ in loops:
        spread = jax.vmap(spread)
    numbers = jnp.arange(writer.systems * out, dtype=jnp.int32).reshape(*sizes, -1, out)
    owners = np.asarray(result.moved.of(spread(numbers)))
    try:
        index = np.broadcast_to(index, owners.shape)  # an axis of size 1 stretches
    except ValueError:
        return None
    owner = np.full(math.prod(shape), -1)
    owner[index.ravel()] = owners.ravel()
    if (owner[index] != owners).any():  # one number is added to two outputs
        return None
    for use in uses:
        if use.moved.source == path and use is not added[0] and (owner[use.moved.index(shape)] >= 0).any():
            return None
    return Carrier(path, owner)
