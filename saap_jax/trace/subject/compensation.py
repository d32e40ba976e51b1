"""Least squares of a traced model: at the contractions that carry a structure's units onward, W[K] makes up for W[R].

Formulas and dampings are those of `surgery.corrections`; what is written here gathers their sums. A writer (see
`trace.writers`) is what the output matrix of a sub-block is in our LLaMA, each of its systems (a turn of a scan, an
expert) is corrected for itself, and the target T is what the dense model writes there, a W:

    propagate = dense    â are the dense model's activations: one pass over the examples
    propagate = pruned   â are those of the model as pruned and corrected so far, in the order of the program: each
                         also makes up for what those before it got wrong. One pass a corrected system (all experts of a
                         contraction together), of the dense model and of the pruned one

Every row of activations counts alike: what reads the result, and which rows are padding, is not known of a traced
program. Contractions of which no unit goes stay as they are. Left alone, and named by `unrepaired`, is what has no
such contraction; streams, which every part of a model adds to and reads; and experts, without which the router deals
the same rows out to others.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saap_jax.estimation.base import wide
from saap_jax.subjects.base import Progress, silent
from saap_jax.surgery.corrections import Correction, Normal, Repair, corrected, kept_rows
from saap_jax.surgery.corrections import rows_of as some_rows
from saap_jax.trace.cut import like
from saap_jax.trace.problem import Examples
from saap_jax.trace.subject.problem import TracedProblem, batches, rows_of
from saap_jax.trace.trace import by_path
from saap_jax.trace.writers import Writer
from saap_jax.types import HELD_OUT, Gates, Keep

S = TypeVar("S", bound=TracedProblem)

DAMPING = 0.3
"""Of least squares where none is given: examples are of the kind that the model is judged on, and they are few."""


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


def unrepaired(subject: TracedProblem, /, repair: Repair, keep: Keep | None = None) -> dict[str, str]:
    """Tell why structures are left as they are, by name; with `keep` only of those that lose units."""
    barred = _barred(subject)
    lost = [each.name for each in subject.structures if keep is None or not np.asarray(keep[each.name]).all()]
    gone = barred.keys() & lost if keep is not None else set()
    done = {name for each in correctable(subject) if not each.units.keys() & gone for name in each.units}

    def reason(name: str) -> str:
        own = subject.writers.of(name)
        if name in barred or not own:
            return barred.get(name) or subject.writers.without[name]
        if all(each.shared for each in own):
            return own[0].shared
        return f"{own[0].path} also loses units of {', '.join(sorted(own[0].units.keys() & barred.keys()))}"

    return {name: reason(name) for name in lost if name in barred or name not in done}


def check_repair(subject: TracedProblem, /, repair: Repair, microbatches: int) -> None:
    """Raise ValueError for a repair that a traced model cannot have, or of which nothing can be done."""
    if repair.biases:
        raise ValueError("bias: expected no repair, or least_squares, for a traced model")
    if "noise" in getattr(repair, "non_default_options", {}):
        raise ValueError(
            "least_squares.noise: is beside the tokens of a text, which a traced model does not count; give damping"
        )
    if not correctable(subject):
        name, reason = next(iter(unrepaired(subject, repair).items()))
        raise ValueError(f"repair: expected none for this model, of which no structure can be (of {name}: {reason})")


def _turns(subject: TracedProblem, keep: Keep) -> list[tuple[Writer, np.ndarray, list[int]]]:
    """List in the order of the program what is corrected together: a writer, the coordinates of its systems that are
    kept, and the systems of one turn of its scans."""
    gone = {name for name in _barred(subject) if not np.asarray(keep[name]).all()}
    turns: dict[tuple[int, ...], tuple[Writer, np.ndarray, list[int]]] = {}
    for writer in correctable(subject):
        kept = writer.kept(keep)
        for system in np.flatnonzero(~kept.all(1)).tolist() if not writer.units.keys() & gone else ():
            turns.setdefault(writer.turn(system), (writer, kept, []))[2].append(system)
    return [turns[key] for key in sorted(turns)]


def _damped(repair: Repair) -> Repair:
    """Give least squares a damping where it has none."""
    missing = getattr(repair, "damping", 0.0) is None
    if missing:
        return dataclasses.replace(repair, damping=DAMPING)
    return repair


def repaired(
    subject: S,
    /,
    keep: Keep,
    examples: Examples,
    repair: Repair,
    *,
    dense: Any,
    batch_size: int = 8,
    progress: Progress = silent,
) -> tuple[S, list[Correction]]:
    """Correct the matrices that carry kept units onward, on calibration examples; `progress` wraps the corrections.

    Returns:
        The subject with parameters of the same shapes, what belongs to removed units 0 in corrected matrices; and what
        was done where.

    Raises:
        ValueError: a repair that can do nothing here, or a model that was repaired before.
    """
    check_repair(subject, repair, 0)
    if dense is not subject:
        raise ValueError("repair: expected one repair of a traced model, got a second one behind it")
    params = subject.problem.params
    pruned = repair.propagate == "pruned"
    repair = _damped(repair)
    given = by_path(params)
    values = dict(given)
    corrections = []
    gates: Gates = {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}

    def now() -> Any:
        leaves = [
            each if each is given[path] else like(jnp.asarray(each), given[path]) for path, each in values.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    parts = list(batches(examples, batch_size, subject.layout))
    turns = _turns(subject, keep)
    places = list(dict.fromkeys(writer for writer, _, _ in turns))
    run = subject.program(("rows", *(place.tap for place in places)), lambda: jax.jit(rows_of(subject, [*places])))
    if pruned:
        stages = [[turn] for turn in turns]
    elif turns:
        stages = [turns]
    else:
        stages = []
    for stage in progress(stages):
        params_now = now()
        weights_of = [wide(w.matrices(given[w.path]))[np.asarray(s)] for w, _, s in stage]
        sums: list[list[Normal | None]] = [[None, None] for _ in stage]
        for number, ((inputs, _), weights) in enumerate(parts):
            whole = run({}, params, inputs)
            active = run(gates, params_now, inputs) if pruned else whole
            slot = int(number % HELD_OUT == HELD_OUT - 1)  # every so many batches are held out
            for own, weight, (writer, _, systems) in zip(sums, weights_of, stage, strict=True):
                chosen = (rows[writer.tap][:, np.asarray(systems)] for rows in (active, whole))
                new = _normal(*chosen, weight, jnp.asarray(weights))
                own[slot] = new if own[slot] is None else jax.tree.map(jnp.add, own[slot], new)
        for own, weight, (writer, kept, systems) in zip(sums, weights_of, stage, strict=True):
            for at, system in enumerate(systems):
                rows, _ = kept_rows(kept[system])
                fit, held = (each and some_rows(Normal(*(leaf[at] for leaf in each)), rows) for each in own)
                assert fit is not None
                matrix, _, damping, errors = corrected((fit, held), weight[at], kept[system], repair)
                values[writer.path] = writer.replaced(values[writer.path], system, np.asarray(matrix))
                lost = [name for name in writer.units if not writer.kept({name: keep[name]})[system].all()]
                corrections.append(Correction(" × ".join(lost), system, damping, *errors))
    return dataclasses.replace(subject, problem=dataclasses.replace(subject.problem, params=now())), corrections


@jax.jit
def _normal(
    active: Float[Array, "batch systems rows coordinates"],
    dense: Float[Array, "batch systems rows coordinates"],
    weight: Float[Array, "systems coordinates out"],
    weights: Float[Array, "batch"],
) -> Normal:
    """Sum over the rows of a batch what the least-squares problem of each system needs, toward T = a W."""
    target = jnp.einsum("bsrc,sco->bsro", dense, weight, precision="highest")
    own = weights.astype(active.dtype)[:, None, None, None]
    weighted = active * own
    wanted = target * own
    gram = jnp.einsum("bsrc,bsrd->scd", weighted, active, precision="highest")
    cross = jnp.einsum("bsrc,bsro->sco", active, wanted, precision="highest")
    count = jnp.broadcast_to(jnp.sum(own) * active.shape[2], weight.shape[:1])
    return Normal(
        gram, cross, weighted.sum((0, 2)), wanted.sum((0, 2)), jnp.sum(wanted * target, (0, 2, 3)), count, count
    )
