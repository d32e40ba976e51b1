"""Contractions in which a structure's gated activations meet a parameter: what carries its units onward.

In an MLP that is the down projection, of heads the output projection. Such a writer is a set of systems, one for each
turn of the scans that deal out its parameter and for each index of the product's batch axes (experts): rows of
activations a `[rows, coordinates]` times a matrix W `[coordinates, out]`. Coordinates are what is summed over; of a
convolution, the channels of a window.
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

from saap_jax.discovery.tracing.interpret import Path, Tap
from saap_jax.discovery.tracing.moved import Moved, Use, uses_of
from saap_jax.discovery.tracing.nested import called_program, opened
from saap_jax.discovery.tracing.program import CALLS
from saap_jax.discovery.tracing.rules import dtype_of, shape_of
from saap_jax.discovery.tracing.trace import Gate, Traced, TracedStructure


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the operands of a product are rows of activations and matrices."""

    eqn: JaxprEqn
    operand: int
    """The operand of the activations."""

    @property
    def is_convolution(self) -> bool:
        """Whether rows are windows."""
        return self.eqn.primitive.name == "conv_general_dilated"

    def axes(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the batch, contracted and other axes of an operand of a `dot_general`."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class Writer:
    """One such contraction."""

    equation: Path
    operand: int
    """That of the activations."""
    where: str
    path: str
    """The parameter."""
    moved: Moved
    geometry: Geometry
    scans: tuple[Path, ...]
    """Around it, the outermost first."""
    lengths: Mapping[Path, int]
    """Turns of each of them."""
    backwards: frozenset[Path]
    """Those of them that start at their last turn."""
    index: Shaped[np.ndarray, "systems coordinates out"]
    """Where each number of the matrices lies in the parameter, flat."""
    units: Mapping[str, Int[np.ndarray, "systems coordinates"]]
    """By structure that acts there: which unit of which copy a coordinate belongs to, flat; -1: none."""
    carrier: Carrier | None
    """The bias behind it, if there is one."""

    @property
    def tap(self) -> Tap:
        """Where its activations stand."""
        return self.equation, self.operand

    @property
    def systems(self) -> int:
        """How many matrices there are."""
        return len(self.index)

    @functools.cached_property
    def turns(self) -> list[tuple[int, ...]]:
        """The turns of the scans that deal out its parameter, in the order of the systems."""
        return list(np.ndindex(*(self.lengths[scan] for scan in self.moved.loops)))

    def rows(self, active: Float[Array, "..."]) -> Float[Array, "systems rows coordinates"]:
        """Return the activations of one example, `[*turns of the scans, *operand]`, as rows of each system."""
        each = self.geometry.rows
        for _ in self.scans:
            each = jax.vmap(each)
        found = each(active)
        own = [self.scans.index(scan) for scan in self.moved.loops]
        others = [axis for axis in range(len(self.scans)) if axis not in own]
        batch, row, coordinate = range(len(self.scans), len(self.scans) + 3)
        ordered = jnp.transpose(found, (*own, batch, *others, row, coordinate))
        return ordered.reshape(self.systems, -1, found.shape[-1])

    def matrices(self, value: Array | np.ndarray) -> Float[Array, "systems coordinates out"]:
        """Return the parameter's numbers as matrices."""
        return jnp.ravel(jnp.asarray(value))[self.index]

    def replaced(
        self, value: Array | np.ndarray, system: int, matrix: Float[np.ndarray, "coordinates out"]
    ) -> np.ndarray:
        """Return the parameter with another matrix of one system, in its own type."""
        flat = np.array(value).ravel()
        flat[self.index[system]] = np.asarray(matrix).astype(flat.dtype)
        return flat.reshape(value.shape)

    def kept(self, keep: Mapping[str, Bool[np.ndarray, "copies units"]]) -> Bool[np.ndarray, "systems coordinates"]:
        """Return which coordinates belong to units that are kept, or to none."""
        kept = np.ones(self.index.shape[:2], bool)
        for name, units in self.units.items():
            if name in keep:
                kept &= np.where(units >= 0, np.ravel(keep[name])[units], True)
        return kept

    def turn(self, system: int) -> tuple[int, ...]:
        """Return a key by which matrices are applied one after the other: the place, with the turn of each scan."""
        batch = self.systems // len(self.turns)
        turns = dict(zip(self.moved.loops, self.turns[system // batch], strict=True))
        key: list[int] = []
        for depth, number in enumerate(self.equation):
            key.append(number)
            if (scan := self.equation[: depth + 1]) in turns:
                key.append(int(turns[scan]) * (-1 if scan in self.backwards else 1))
        return tuple(key)


@dataclasses.dataclass(frozen=True, eq=False)
class Writers:
    """The writers of some structures, in the order of the program."""

    found: tuple[Writer, ...]
    without: Mapping[str, str]
    """Why a structure has none, by name."""

    def of(self, structure: str) -> tuple[Writer, ...]:
        """Return the writers of a structure."""
        return tuple(writer for writer in self.found if structure in writer.units)


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
    found, reasons = [], {}
    for (equation, operand), gates in sorted(at_place.items()):
        try:
            writer = _writer(traced, uses, by_name, equation, operand, gates)
        except _NoWriterError as failure:
            for name in gates:
                reasons.setdefault(name, f"{failure} at {gates[name][0].where}")
        else:
            found.append(writer)
    held = {name for writer in found for name in writer.units}
    return Writers(tuple(found), {name: reasons[name] for name in by_name if name not in held})


def _writer(
    traced: Traced,
    uses: Sequence[Use],
    structures: Mapping[str, TracedStructure],
    equation: Path,
    operand: int,
    gates: Mapping[str, Sequence[Gate]],
) -> Writer:
    """Return the writer at a place.

    Raises:
        _NoWriterError: there is none.
    """
    placed = _find(traced.program, equation)
    eqn = placed.eqn
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        raise _NoWriterError(f"its units are summed by {eqn.primitive.name}")
    moved = next((use.moved for use in uses if use.equation == equation and use.operand == 1 - operand), None)
    if moved is None or not isinstance(moved.source, str):
        raise _NoWriterError("its units meet no parameter as it is")
    path = moved.source
    if eqn.primitive.name == "conv_general_dilated" and (
        operand != 0 or eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
    ):
        raise _NoWriterError("its units meet a grouped convolution")
    if not jnp.issubdtype(_dtypes(traced)[path], jnp.floating):
        raise _NoWriterError(f"its units meet integers, {path},")
    geometry, shape = Geometry(eqn, operand), traced.shapes[path]
    matrices = geometry.matrices
    for _ in moved.loops:
        matrices = jax.vmap(matrices)
    size = math.prod(shape)
    numbers = np.asarray(matrices(jnp.asarray(moved.index(shape))))
    index = numbers.reshape(-1, *numbers.shape[-2:])
    own = np.zeros(size, bool)
    own[index.ravel()] = True
    if np.count_nonzero(own) != index.size:
        raise _NoWriterError(f"numbers of {path} are repeated")
    for use in uses:
        here = (use.equation, use.operand) == (equation, 1 - operand)
        if use.moved.source == path and not here and own[use.moved.index(shape).ravel()].any():
            raise _NoWriterError(f"{path} is used elsewhere too, beside the product")
    made = Writer(
        equation, operand, next(iter(gates.values()))[0].where, path, moved, geometry, placed.scans, placed.lengths,
        placed.backwards, index, {}, None,
    )  # fmt: skip
    units = {name: _units(made, structures[name], each) for name, each in gates.items()}
    return dataclasses.replace(made, units=units, carrier=_carrier(traced, uses, made))


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


def _units(writer: Writer, structure: TracedStructure, gates: Sequence[Gate]) -> Int[np.ndarray, "systems coordinates"]:
    """Return which unit of which copy each coordinate belongs to.

    Raises:
        _NoWriterError: a coordinate belongs to two units, or a copy is no system.
    """
    shape, depth = shape_of(writer.geometry.eqn.invars[writer.operand]), len(writer.scans)
    gate = gates[0]
    unit = np.full(shape[gate.axis], -1)
    for place in gate.places:
        for number in range(structure.units):
            indices = place.indices(number)
            if (unit[indices] != -1).any():
                raise _NoWriterError("a number belongs to two units")
            unit[indices] = number
    if len(gates) > 1:
        raise _NoWriterError("a number belongs to two units")
    axes = [depth + gate.axis]
    axes += [writer.scans.index(each) if isinstance(each, tuple) else depth + each for each in gate.along]
    whole = (*(writer.lengths[scan] for scan in writer.scans), *shape)
    copy = np.zeros([1] * len(whole), np.int64)
    for size, axis in zip(structure.copied, axes[1:], strict=True):
        copy = copy * size + np.arange(size).reshape([size if axis == i else 1 for i in range(len(whole))])
    unit = unit.reshape([len(unit) if axis == axes[0] else 1 for axis in range(len(whole))])
    numbers = np.where(unit >= 0, copy * structure.units + unit, -1)
    if writer.geometry.is_convolution:
        if any(axis >= depth for axis in axes[1:]):
            raise _NoWriterError("its copies are no systems")
        feature = depth + writer.geometry.eqn.params["dimension_numbers"].lhs_spec[1]
        assert axes[0] == feature
        flat = np.broadcast_to(
            numbers, [*whole[:depth], *(n if depth + i == feature else 1 for i, n in enumerate(shape))]
        )
        flat = flat.reshape(*whole[:depth], 1, 1, -1)
        flat = np.repeat(flat, writer.index.shape[1] // flat.shape[-1], axis=-1)
        return _first_rows(writer, flat)
    batch, contracted, free = writer.geometry.axes(writer.operand)
    if any(axis - depth in free for axis in axes):
        raise _NoWriterError("its copies are no systems")
    flat = np.broadcast_to(numbers, [*whole[:depth], *(1 if i in free else n for i, n in enumerate(shape))])
    flat = np.transpose(flat, (*range(depth), *(depth + axis for axis in (*batch, *free, *contracted))))
    return _first_rows(writer, flat.reshape(*whole[:depth], math.prod(shape[i] for i in batch), 1, -1))


def _first_rows(writer: Writer, numbers: np.ndarray) -> Int[np.ndarray, "systems coordinates"]:
    """Return numbers `[*turns, batch, 1, coordinates]` by system; those of scans that share a matrix are the same."""
    own = [writer.scans.index(scan) for scan in writer.moved.loops]
    others = [axis for axis in range(len(writer.scans)) if axis not in own]
    depth = len(writer.scans)
    ordered = np.transpose(numbers, (*own, depth, *others, depth + 1, depth + 2))
    ordered = ordered.reshape(writer.systems, -1, numbers.shape[-1])
    if (ordered != ordered[:, :1]).any():
        raise _NoWriterError("its copies are no systems")
    return ordered[:, 0]


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
    loops = writer.moved.loops
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
