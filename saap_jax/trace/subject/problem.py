"""A problem, traced on one example: which structures may be pruned, its losses with gates, and the cut model.

Everything runs on one example at a time as the program was traced, and `vmap` makes batches of it. On a mesh, examples
lie over `data` and `fsdp` and each parameter over `fsdp`, by its largest axis that is divided by it: axes of somebody
else's arrays have no names for rules to go by, and the compiler splits the program by where they lie.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from saap_jax.config.mesh import BATCH, WEIGHTS
from saap_jax.estimation.base import wide
from saap_jax.runtime.mesh import Layout
from saap_jax.subjects.base import tolerance_of
from saap_jax.trace.cut import keep_units, kept_shapes, smaller
from saap_jax.trace.interpret import gated, tapped
from saap_jax.trace.own_code import Verdict, compared, nearby, verdicts
from saap_jax.trace.problem import Examples, Problem, count_examples
from saap_jax.trace.program import Tap
from saap_jax.trace.trace import Traced, TracedStructure, trace
from saap_jax.trace.writers import Contraction, Writer, Writers, writers_of
from saap_jax.types import Gates, Keep

Run = Callable[..., Any]
"""`run(gates, params, *inputs)`: outputs of one example, as a batch of one."""


@dataclasses.dataclass(frozen=True, eq=False)
class TracedProblem:
    """A problem, the traced program of its function, and the structures that may be pruned."""

    problem: Problem
    traced: Traced
    structures: tuple[TracedStructure, ...]
    left_out: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)
    """Structures that would be prunable, but that the model's own code does not take smaller."""
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Compiled programs, each made once."""
    layout: Layout | None = None
    """Where parameters and examples lie, on a mesh; None: where they are."""

    def program(self, key: Any, make: Callable[[], Any]) -> Any:
        """Look up the program of a key, made where it is not there yet."""
        if key not in self.programs:
            self.programs[key] = make()
        return self.programs[key]

    @functools.cached_property
    def writers(self) -> Writers:
        """The contractions with parameters that carry the structures' units onward."""
        return writers_of(self.traced, self.structures)

    def acting(self, name: str) -> tuple[Contraction, ...]:
        """Find where the units of a structure act."""
        return self.writers.acting(name)

    @functools.cached_property
    def tolerance(self) -> float:
        """How far the losses of the masked and of the cut model may be apart, by the type of the parameters."""
        return max(tolerance_of(leaf.dtype) for leaf in jax.tree.leaves(self.problem.params))

    @property
    def ones(self) -> Gates:
        """Gates that keep everything, `[copies, units]` a structure."""
        return {each.name: jnp.ones((each.copies, each.units), jnp.float32) for each in self.structures}

    @functools.cached_property
    def existing(self) -> Keep:
        """Which units there are, all of them, `[copies, units]`."""
        return {each.name: np.ones((each.copies, each.units), bool) for each in self.structures}

    def by_copies(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Shape `[copies, units]` of each structure as `[*copied, units]`, which traced programs take."""
        shapes = {each.name: (*each.copied, each.units) for each in self.structures}
        return {name: each.reshape(shapes[name]) for name, each in values.items()}

    @functools.cached_property
    def parameters(self) -> int:
        """All parameters."""
        return sum(map(math.prod, self.traced.shapes.values()))

    @functools.cached_property
    def prunable(self) -> int:
        """The parameters that belong to a structure that may be pruned, each once."""
        return self.removed({name: np.zeros_like(units) for name, units in self.existing.items()})

    def removed(self, keep: Keep) -> int:
        """Count the parameters that a cut removes."""
        return self.parameters - sum(map(math.prod, kept_shapes(self.traced, self.by_copies(keep)).values()))


# --- what is pruned --------------------------------------------------------------------------------


def traced_problem(
    problem: Problem, layout: Layout | None = None, *, norms: bool = False, refused: bool = False
) -> TracedProblem:
    """Trace a problem's function on one example, find what may be pruned, and place the parameters.

    Args:
        norms: whether structures that a norm averages over may be pruned too.
        refused: whether structures may be pruned too that the model's own code does not take smaller, or with which it
            computes something else.

    Raises:
        ValueError: a function that cannot be traced or that mixes the examples of a batch, no structure that may be
            pruned, or devices of several processes.
    """
    check_layout(layout)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(problem.params)):
        raise ValueError("Problem.params: expected concrete arrays, got ShapeDtypeStruct; initialise or load them")
    try:
        traced = trace(problem.function, problem.params, *problem.example)
    except Exception as error:  # whatever the function raises
        raise ValueError(f"Problem.function: cannot be traced: {type(error).__name__}: {error}") from error
    _check_batches(problem)

    def may_go(structure: TracedStructure) -> bool:
        """Units act somewhere, and a member holds floating point: beside quantised ones, their scales or a bias."""
        floats = any(jnp.issubdtype(traced.dtypes[member.path], jnp.floating) for member in structure.members)
        return bool(structure.gates) and floats and (norms or not structure.normalised or structure.least > 0)

    structures = tuple(filter(may_go, traced.prunable))
    left_out = {}
    if not refused:
        plain = [each for each in structures if not each.normalised]  # others are asked for by `norms`
        found = verdicts(problem.function, traced, plain, problem.params, *problem.example)
        left_out = {name: verdict for name, verdict in found.items() if verdict.verdict in ("differs", "refuses")}
        structures = tuple(each for each in structures if each.name not in left_out)
    if not structures:
        others = ""
        if not norms:
            others = "; structures that a norm averages over take part with norms=True"
        if left_out:
            name = next(iter(left_out))
            others += (
                f"; {len(left_out)} that the model's own code does not take smaller take part with refused=True (of "
                f"{name} it {left_out[name]})"
            )
        raise ValueError(
            f"Problem.function: expected a structure that can be pruned, found none of {len(traced.structures)} (see "
            f"`saap discover`){others}"
        )
    problem = dataclasses.replace(problem, params=place_params(problem.params, layout))
    return TracedProblem(problem, traced, structures, left_out, layout=layout)


def _check_batches(problem: Problem) -> None:
    """Refuse a function of which the outputs of two examples are not those of each, one after the other."""
    both = _two_examples(problem)
    together = jax.tree.map(lambda *rows: jnp.concatenate(rows), *both)
    run = jax.jit(problem.function)
    joint, *alone = (jax.tree.leaves(run(problem.params, *problem.inputs(inputs))) for inputs in (together, *both))
    for out, *rows in zip(joint, *alone, strict=True):
        shapes = [tuple(each.shape) for each in (out, *rows)]
        if not out.ndim or shapes != [(2, *out.shape[1:]), *[(1, *out.shape[1:])] * 2]:
            raise ValueError(
                f"Problem.function: expected outputs with the batch as their first axis, got shape {shapes[0]} of two "
                f"examples and {shapes[1]} of one"
            )
        own = np.concatenate([np.asarray(row) for row in rows])
        if not np.isfinite(np.asarray(out)).all() or compared(out, own).verdict != "takes":
            raise ValueError(
                "Problem.function: expected the outputs of an example to be the same whatever else is in its batch, "
                "got others (statistics of the batch, random numbers, or values that are not finite?)"
            )


def _two_examples(problem: Problem) -> list[Any]:
    """Find the inputs of the first example, and of the first that differs from it; of one near it where none does."""
    first, *_ = problem.row(problem.first_set, 0)
    for index in range(1, count_examples(problem.first_set)):
        other, *_ = problem.row(problem.first_set, index)
        if not all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other))):
            return [first, other]
    return [first, nearby(first)]


# --- examples --------------------------------------------------------------------------------------


def loss_of_one(subject: TracedProblem, run: Run | None = None) -> Callable[..., Float[Array, ""]]:
    """Make `loss(gates, params, inputs, targets)` of one example, without the axis of a batch."""
    program = gated(subject.traced)
    run = run or (lambda gates, params, *inputs: program(subject.by_copies(gates), params, *inputs))

    def loss(gates: Gates, params: Any, inputs: Any, targets: Any) -> Float[Array, ""]:
        row, wanted = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))
        return subject.problem.loss_of(run(gates, params, *subject.problem.inputs(row)), wanted)

    return loss


def rows_of(subject: TracedProblem, places: list[Contraction]) -> Callable[..., dict[Tap, Array]]:
    """Make `rows(gates, params, inputs)` of a batch: activations `[batch, systems, rows, coordinates]` at each place.

    Where units meet no parameter, the rows of what they are multiplied with are there too.
    """
    met = [(place.partner, place) for place in places if place.partner and not isinstance(place, Writer)]
    run = tapped(subject.traced, [*(place.tap for place in places), *(tap for tap, _ in met)])

    def rows(gates: Gates, params: Any, inputs: Any) -> dict[Tap, Array]:
        def of_one(row: Any) -> dict[Tap, Array]:
            row = jax.tree.map(lambda leaf: leaf[None], row)
            _, found = run(subject.by_copies(gates), params, *subject.problem.inputs(row))
            own = {place.tap: place.rows(wide(found[place.tap])) for place in places}
            return own | {tap: place.by_system(wide(found[tap]), *place.axes(tap[1])) for tap, place in met}

        return jax.vmap(of_one)(inputs)

    return rows


def batches(
    examples: Examples, size: int, layout: Layout | None = None
) -> Iterator[tuple[Examples, Float[np.ndarray, "batch"]]]:
    """Yield batches of one size, and the weight of each row: 0 of the last example, repeated to fill the last one."""
    if not (isinstance(size, int | np.integer) and size > 0):
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {size}")
    count = count_examples(examples)
    size = min(size, count)
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        batch = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf)[np.minimum(rows, count - 1)], examples)
        yield place_rows(batch, layout), (rows < count).astype(np.float32)


# --- cut -------------------------------------------------------------------------------------------


def cut(subject: TracedProblem, keep: Keep) -> tuple[Callable[..., Any], Any]:
    """Cut the model: `function(params, *inputs)`, and its smaller parameters.

    The function takes a batch of any size, and inputs of any shape that the dense model takes, such as any sequence
    length: it is traced once for each. Its outputs are those of the masked model.
    """
    return cut_function(subject, keep), keep_units(subject.traced, subject.by_copies(keep), subject.problem.params)


def cut_function(subject: TracedProblem, keep: Keep) -> Callable[..., Any]:
    """Make the function of `cut`.

    Raises:
        ValueError: in the function: inputs that the dense model does not take, or at which a structure is another.
    """
    shaped = subject.by_copies(keep)
    programs: dict[Any, Callable[..., Any]] = {}

    def function(params: Any, *inputs: Any) -> Any:
        rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), inputs)
        key = _shapes(rows)
        if key not in programs:
            programs[key] = smaller(at_shapes(subject, rows), shaped)

        def one(*row: Any) -> Any:
            outputs = programs[key](params, *jax.tree.map(lambda leaf: leaf[None], row))
            return jax.tree.map(lambda leaf: leaf[0], outputs)

        return jax.vmap(one)(*inputs)

    return function


def at_shapes(subject: TracedProblem, inputs: tuple[Any, ...]) -> Traced:
    """Trace the program of a batch of one example of other shapes, with the subject's structures.

    A traced program holds the shapes of its inputs: another sequence length is another program. Which axes of
    parameters belong together does not depend on it, so what was chosen at one length is cut at any.

    Raises:
        ValueError: the function does not take such inputs, or a structure is another there.
    """
    problem = subject.problem
    before = subject.traced
    if _shapes(inputs) == _shapes(problem.example):
        return before
    said = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(inputs))
    try:
        again = trace(problem.function, problem.params, *inputs)
    except Exception as error:  # whatever the function raises
        raise ValueError(
            f"the function cannot be traced with inputs {said}: {type(error).__name__}: {error}; expected inputs that "
            "the dense model takes"
        ) from error
    found = {(each.copied, frozenset(each.members)): each for each in again.prunable}
    structures = []
    for wanted in subject.structures:
        if (same := found.get((wanted.copied, frozenset(wanted.members)))) is None:
            members = ", ".join(f"{member.path}[{member.axis}]" for member in wanted.members)
            raise ValueError(
                f"structure {wanted.name} with inputs {said}: expected it with the members of the first trace, "
                f"{members}, prunable; trace the model at this shape, or leave the structure alone"
            )
        structures.append((same.name, dataclasses.replace(same, name=wanted.name)))
    atoms = {each.name: again.atoms[name] for name, each in structures}
    return dataclasses.replace(again, structures=tuple(each for _, each in structures), atoms=atoms)


def _shapes(inputs: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(inputs)
    return (tree, *((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves))


# --- on a mesh -------------------------------------------------------------------------------------


def check_layout(layout: Layout | None) -> None:
    """Refuse devices of several processes, over which nothing of a traced model is spread."""
    if layout is not None and (processes := jax.process_count()) > 1:
        raise ValueError(f"mesh: expected the devices of one process for a traced model, got {processes} processes")


def place_params(params: Any, layout: Layout | None) -> Any:
    """Spread parameters over `fsdp`; those that no axis of fits are on every device, as all are on `data`."""
    if layout is None:
        return params
    count = layout.mesh.shape[WEIGHTS]

    def place(leaf: Any) -> Any:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size and size % count == 0]
        widest = None
        if fitting and count > 1:
            widest = max(fitting, key=lambda axis: leaf.shape[axis])
        spec = PartitionSpec(*(WEIGHTS if axis == widest else None for axis in range(leaf.ndim)))
        return jax.device_put(leaf, NamedSharding(layout.mesh, spec))

    return jax.tree.map(place, params)


def place_rows(examples: Examples, layout: Layout | None) -> Examples:
    """Spread examples over `data` and `fsdp`; they are on every device where their number is not divided."""
    if layout is None:
        return examples

    def place(leaf: Any) -> Any:
        parts = None
        if leaf.shape[0] % layout.batch_shards == 0:
            parts = BATCH
        return jax.device_put(np.asarray(leaf), NamedSharding(layout.mesh, PartitionSpec(parts)))

    return jax.tree.map(place, examples)
