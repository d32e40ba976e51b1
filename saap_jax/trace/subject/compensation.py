"""Least squares of a traced model: at the contractions that carry a structure's units onward, W[K] makes up for W[R].

Formulas and dampings are those of `surgery.corrections`; what is written here gathers their sums. A writer (see
`trace.writers`) is what the output matrix of a sub-block is in our LLaMA, each of its systems (a turn of a scan, an
expert) is corrected for itself, and the target T is what the dense model writes there, a W:

    propagate = dense    â are the dense model's activations: one pass over the examples, which serves all keep-sets
    propagate = pruned   â are those of the model as pruned and corrected so far, in the order of the program: each
                         also makes up for what those before it got wrong. One pass a corrected system (all experts of a
                         contraction together), of the dense model and of the pruned one

Every row of activations counts alike: what reads the result, and which rows are padding, is not known of a traced
program. Contractions of which no unit goes stay as they are. Left alone, and named by `unrepaired`, is what has no
such contraction; streams, which every part of a model adds to and reads; and experts, without which the router deals
the same rows out to others.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saap_jax.estimation.base import wide
from saap_jax.subjects.base import Progress, silent
from saap_jax.surgery.corrections import Correction, Normal, Repair, corrected
from saap_jax.trace.cut import like
from saap_jax.trace.interpret import Tap, tapped
from saap_jax.trace.jaxpr import shape_of
from saap_jax.trace.problem import Examples
from saap_jax.trace.subject.problem import TracedProblem, batches
from saap_jax.trace.trace import parameter_paths
from saap_jax.trace.writers import Writer
from saap_jax.types import HELD_OUT, Gates, Keep


class Sums(NamedTuple):
    """Over the rows of activations of some examples, each with the weight 1."""

    product: Float[Array, "systems coordinates coordinates"]
    """Of a aᵀ."""
    mean: Float[Array, "systems coordinates"]
    """Of a."""
    weight: Float[Array, ""]
    """Rows."""


# --- what is corrected ---------------------------------------------------------------------------


def _barred(subject: TracedProblem) -> dict[str, str]:
    """Tell why structures are never compensated, whatever their contractions are, by name."""
    reasons = {}
    for each in subject.structures:
        if each.least or each.role == "experts":
            reasons[each.name] = "its units are experts, whose rows go to others"
        elif each.role == "stream" or each.normalised:
            reasons[each.name] = "it is a stream that several parts read, or that a norm averages over"
    return reasons


def correctable(subject: TracedProblem) -> list[Writer]:
    """Choose the writers that can be corrected, in the order of the program."""
    barred = _barred(subject).keys()
    return [each for each in subject.writers.found if not each.shared and each.units.keys() - barred]


def unrepaired(subject: TracedProblem, keep: Keep | None = None) -> dict[str, str]:
    """Tell why structures are left as they are, by name; with `keep` only of those that lose units."""
    lost = {each.name for each in subject.structures if keep is None or not np.asarray(keep[each.name]).all()}
    barred = _barred(subject)
    gone = barred.keys() & lost if keep is not None else set()
    done = {name for each in correctable(subject) if not each.units.keys() & gone for name in each.units}
    reasons = {}
    for name in (each.name for each in subject.structures if each.name in lost):
        own = subject.writers.of(name)
        if name in barred:
            reasons[name] = barred[name]
        elif name not in done and not own:
            reasons[name] = subject.writers.without[name]
        elif name not in done and all(each.shared for each in own):
            reasons[name] = own[0].shared
        elif name not in done:
            others = ", ".join(sorted(own[0].units.keys() & barred.keys()))
            reasons[name] = f"{own[0].path} also loses units of {others}"
    return reasons


def check_repair(subject: TracedProblem, repair: Repair) -> None:
    """Raise ValueError for a repair that a traced model cannot have, or of which nothing can be done."""
    if repair.biases:
        raise ValueError("bias: expected no repair, or least_squares, for a traced model")
    if not correctable(subject):
        name, reason = next(iter(unrepaired(subject).items()))
        raise ValueError(f"repair: expected none for this model, of which no structure can be (of {name}: {reason})")


def _due(subject: TracedProblem, keep: Keep) -> list[tuple[Writer, np.ndarray]]:
    """Choose the writers that are to be corrected, with the coordinates of their systems that are kept."""
    gone = {name for name in _barred(subject) if not np.asarray(keep[name]).all()}
    due = [(each, each.kept(keep)) for each in correctable(subject) if not each.units.keys() & gone]
    return [(writer, kept) for writer, kept in due if not kept.all()]


# --- sums ----------------------------------------------------------------------------------------


def _rows_of(subject: TracedProblem, writers: Sequence[Writer]) -> Callable[..., dict[Tap, Array]]:
    """Make `run(gates, params, inputs)` of one example: the rows of each system at each writer."""
    run = tapped(subject.traced, [writer.tap for writer in writers])

    def rows(gates: Gates, params: Any, inputs: Any) -> dict[Tap, Array]:
        row = jax.tree.map(lambda leaf: leaf[None], inputs)
        _, found = run(subject.by_copies(gates), params, *subject.problem.inputs(row))
        return {writer.tap: writer.rows(wide(found[writer.tap])) for writer in writers}

    return rows


def _sums(active: Float[Array, "batch systems rows coordinates"], weights: Float[Array, "batch"]) -> Sums:
    """Sum over the rows of a batch."""
    weighted = active * weights.astype(active.dtype)[:, None, None, None]
    product = jnp.einsum("bsrc,bsrd->scd", weighted, active, precision="highest")
    return Sums(product, jnp.sum(weighted, (0, 2)), jnp.sum(weights).astype(active.dtype) * active.shape[2])


def _add(parts: list[Any], number: int, new: Any) -> None:
    """Add the sums of a batch to those that it belongs to: every `HELD_OUT`-th is held out."""
    slot = int(number % HELD_OUT == HELD_OUT - 1)
    parts[slot] = new if parts[slot] is None else jax.tree.map(jnp.add, parts[slot], new)


# --- corrections ---------------------------------------------------------------------------------


def compensate(
    subject: TracedProblem,
    keep: Keep,
    examples: Examples,
    repair: Repair,
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> tuple[Any, list[Correction]]:
    """Correct the matrices that carry kept units onward, on calibration examples; `progress` wraps the corrections.

    Returns:
        Parameters of the shapes of the given ones, what belongs to removed units 0 in corrected matrices; and what was
        done where.

    Raises:
        ValueError: a repair that can do nothing here.
    """
    params = subject.problem.params
    check_repair(subject, repair)
    given = dict(zip(parameter_paths(params), jax.tree.leaves(params), strict=True))
    values, corrections = dict(given), []

    def now() -> Any:
        leaves = [
            each if each is given[path] else like(jnp.asarray(each), given[path]) for path, each in values.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    due, parts = _due(subject, keep), list(batches(examples, batch_size, subject.layout))
    if repair.propagate == "pruned":
        problems = _in_order(subject, keep, due, parts, now, progress)
    else:
        problems = _at_once(subject, due, parts, progress)
    for writer, system, kept, weight, sums in problems:
        matrix, _, damping, errors = corrected(sums, weight, kept, repair)
        values[writer.path] = writer.replaced(values[writer.path], system, np.asarray(matrix))
        lost = [name for name in writer.units if not writer.kept({name: keep[name]})[system].all()]
        corrections.append(Correction(" × ".join(lost), system, damping, *errors))
    return now(), corrections


Solvable = tuple[Writer, int, np.ndarray, Array, tuple[Normal, Normal | None]]
"""A system of a writer, the coordinates that it keeps, its dense matrix, and the sums that correct it."""


def _weight(subject: TracedProblem, writer: Writer) -> Float[Array, "systems coordinates out"]:
    """Take the dense matrices of a writer."""
    params = subject.problem.params
    value = dict(zip(parameter_paths(params), jax.tree.leaves(params), strict=True))[writer.path]
    return wide(writer.matrices(value))


def _at_once(
    subject: TracedProblem, due: Sequence[tuple[Writer, np.ndarray]], parts: Sequence[Any], progress: Progress
) -> Iterator[Solvable]:
    """Pose the problems of all systems toward their own outputs, T = a W, from one pass of the dense model."""

    def make() -> Callable[..., dict[Tap, Sums]]:
        run = _rows_of(subject, correctable(subject))

        def step(params: Any, inputs: Any, weights: Array) -> dict[Tap, Sums]:
            rows = jax.vmap(lambda row: run({}, params, row))(inputs)
            return {place: _sums(active, weights) for place, active in rows.items()}

        return jax.jit(step)

    step = subject.program("moments", make)
    sums: list[dict[Tap, Sums] | None] = [None, None]
    for number, ((inputs, _), weights) in enumerate(parts if due else ()):
        _add(sums, number, step(subject.problem.params, inputs, jnp.asarray(weights)))

    def toward_itself(sums: Sums, weight: Array, system: int) -> Normal:
        product, mean = sums.product[system], sums.mean[system]
        cross = jnp.matmul(product, weight, precision="highest")
        return Normal(product, cross, mean, mean @ weight, jnp.sum(weight * cross), sums.weight)

    for writer, kept in progress(due):
        weight = _weight(subject, writer)
        for system in np.flatnonzero(~kept.all(1)).tolist():
            fit, held = (
                None if part is None else toward_itself(part[writer.tap], weight[system], system) for part in sums
            )
            assert fit is not None
            yield writer, system, kept[system], weight[system], (fit, held)


def _in_order(
    subject: TracedProblem,
    keep: Keep,
    due: Sequence[tuple[Writer, np.ndarray]],
    parts: Sequence[Any],
    now: Callable[[], Any],
    progress: Progress,
) -> Iterator[Solvable]:
    """Pose the problems of one turn of one writer after the other, each on the model as it is corrected by then."""
    alike: dict[Any, list[Writer]] = {}
    turns: dict[tuple[int, ...], tuple[Writer, np.ndarray, list[int]]] = {}
    for writer, kept in due:
        alike.setdefault(_shapes(writer), []).append(writer)
        for system in np.flatnonzero(~kept.all(1)).tolist():
            turns.setdefault(writer.turn(system), (writer, kept, []))[2].append(system)
    gates: Gates = {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}
    for writer, kept, systems in progress([turns[key] for key in sorted(turns)]):
        same = alike[_shapes(writer)]
        key = ("corrected", *(each.tap for each in same))
        step = subject.program(key, functools.partial(_normal_step, subject, tuple(same)))
        width = writer.systems // len(writer.turns)
        first = systems[0] // width * width
        weight, params = _weight(subject, writer)[first : first + width], now()
        sums: list[Normal | None] = [None, None]
        for number, ((inputs, _), weights) in enumerate(parts):
            given = gates, inputs, jnp.asarray(weights), weight, same.index(writer), first
            _add(sums, number, step(subject.problem.params, params, *given))
        for system in systems:
            at = system - first
            fit, held = (None if part is None else Normal(*(leaf[at] for leaf in part)) for part in sums)
            assert fit is not None
            yield writer, system, kept[system], weight[at], (fit, held)


def _shapes(writer: Writer) -> Any:
    """Make a key that writers have in common whose rows are arrays of one shape."""
    eqn = writer.eqn
    shapes = (shape_of(eqn.invars[writer.operand]), shape_of(eqn.outvars[0]), writer.index.shape)
    lengths = tuple(scan.params["length"] for scan in writer.scans.values())
    return (eqn.primitive.name, writer.operand, *shapes, lengths, len(writer.turns))


def _normal_step(subject: TracedProblem, writers: Sequence[Writer]) -> Callable[..., Normal]:
    """Compile the step: the least-squares problems of one turn of one of some writers, of a batch."""
    run = _rows_of(subject, writers)
    width = writers[0].systems // len(writers[0].turns)

    def step(
        dense: Any, now: Any, gates: Gates, inputs: Any, weights: Array, weight: Array, number: Array, first: Array
    ) -> Normal:
        def rows(gates: Gates, params: Any) -> Float[Array, "batch systems rows coordinates"]:
            found = jax.vmap(lambda row: run(gates, params, row))(inputs)
            stacked = jnp.stack([found[writer.tap] for writer in writers])
            return jax.lax.dynamic_slice_in_dim(stacked[number], first, width, 1)

        target = jnp.einsum("bsrc,sco->bsro", rows({}, dense), weight, precision="highest")
        active = rows(gates, now)
        product, mean, count = _sums(active, weights)
        weighted = target * weights.astype(target.dtype)[:, None, None, None]
        cross = jnp.einsum("bsrc,bsro->sco", active, weighted, precision="highest")
        count = jnp.broadcast_to(count, (width,))
        return Normal(product, cross, mean, weighted.sum((0, 2)), jnp.sum(weighted * target, (0, 2, 3)), count)

    return jax.jit(step)
