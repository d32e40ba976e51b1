"""What pruning a researcher's own model needs to know of it: the function, its parameters, a loss, and examples."""

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.runtime.mesh import refuse_explicit_axes
from saap_jax.runtime.sources import run_file
from saap_jax.trace.own_code import Verdict, verdicts
from saap_jax.trace.trace import Traced, trace

Examples = tuple[Any, Any]
"""(inputs, targets): pytrees of arrays whose first axis numbers the examples. Of a function of several inputs, `inputs`
is a plain tuple of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, what is asked of it, and on what.

    >>> import jax, jax.numpy as jnp
    >>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
    >>> problem = Problem(
    ...     function=lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"],
    ...     params={"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))},
    ...     loss=lambda outputs, targets: jnp.square(outputs - targets).mean(),
    ...     calibration=(x, y),
    ...     held_out=(x + 1, y),
    ... )
    >>> problem.example[0].shape, problem.row(problem.first_set, 0)[1].shape
    ((1, 3), (1, 2))
    """

    function: Callable[..., Any]
    """`function(params, *inputs)`: outputs of a batch of examples, each array of them with the batch first."""
    params: Any
    """Arrays, in any pytree. Shapes (`jax.eval_shape`) do for `load_pruned`, which reads the values."""
    loss: Callable[[Any, Any], Any]
    """`loss(outputs, targets)`: one number for a batch, the mean over its examples. It is asked for one at a time."""
    calibration: Examples | Mapping[str, Examples]
    """What units are scored on; sets of it by name are scenarios, whose scores are kept apart."""
    held_out: Examples | Mapping[str, Examples]
    """What pruned models are judged on; of sets by name, the first is of the calibration domain."""
    rebuild: Callable[[Any], Any] | None = None
    """Makes the user's object (a module) of parameters, where the parameters were taken out of one."""

    def __post_init__(self) -> None:
        for name in ("function", "loss"):
            if not callable(given := getattr(self, name)):
                raise ValueError(f"Problem.{name}: expected a function, got {type(given).__name__}")
        for leaf in jax.tree.leaves(self.params):
            kind = leaf.dtype if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) else None
            if kind is None or not (jnp.issubdtype(kind, jnp.number) or jnp.issubdtype(kind, jnp.bool_)):
                got = f"{kind or type(leaf).__name__}; let the function hold it"
                raise ValueError(f"Problem.params: expected arrays of numbers, got {got}")
        shapes = _shapes("calibration", self.calibration) | _shapes("held_out", self.held_out)
        (first, expected), *others = shapes.items()
        for name, other in others:
            if other != expected:
                like = f"the shapes and types of {first}, {expected}"
                raise ValueError(f"Problem.{name}: expected examples of {like}, got {other}")

    def as_subject(self) -> Any:
        """Trace the function, so that steps of chains can prune the model."""
        return importlib.import_module("saap_jax.trace.subject.subject").subject_of(self)

    @property
    def scenarios(self) -> dict[str, Examples]:
        """The calibration examples of each scenario; of one set, `calibration`."""
        return _sets(self.calibration, "calibration")

    @property
    def held_out_sets(self) -> dict[str, Examples]:
        """The held-out examples of each set; of one, `held_out`."""
        return _sets(self.held_out, "held_out")

    @property
    def first_set(self) -> Examples:
        """The calibration examples of the first scenario."""
        return next(iter(self.scenarios.values()))

    @property
    def example(self) -> tuple[Any, ...]:
        """The inputs of the first calibration example, as the function takes them."""
        return self.inputs(self.row(self.first_set, 0)[0])

    def inputs(self, inputs: Any) -> tuple[Any, ...]:
        """Give the inputs as the function takes them."""
        if type(inputs) is tuple:
            return inputs
        return (inputs,)

    def row(self, examples: Examples, index: int) -> Examples:
        """Take one example as a batch of one."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[index : index + 1]), examples)

    def loss_of(self, outputs: Any, targets: Any) -> Any:
        """Compute the loss of a batch of one example.

        Raises:
            ValueError: the loss returns something else than one number.
        """
        value = self.loss(outputs, targets)
        if not isinstance(value, jax.Array) or value.size != 1 or not jnp.issubdtype(value.dtype, jnp.floating):
            if isinstance(value, jax.Array):
                got = f"{value.dtype} of shape {value.shape}"
            else:
                got = type(value).__name__
            raise ValueError(f"Problem.loss: expected one number of floating point for one example, got {got}")
        return value.reshape(())


def _sets(given: Any, name: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    return {name: given}


def _shapes(field: str, given: Any) -> dict[str, list[str]]:
    """Tell type and shape of each array of one example of each set; raise where there is none or numbers differ."""
    refuse_explicit_axes(given)
    found = {}
    for key, examples in _sets(given, field).items():
        name = field if key == field else f"{field}[{key!r}]"
        if not re.fullmatch(r"[\w.-]+", key):
            raise ValueError(f"Problem.{field}: expected names of letters, digits, '.', '_' and '-', got {key!r}")
        if not (isinstance(examples, tuple) and len(examples) == 2):
            raise ValueError(f"Problem.{name}: expected a pair (inputs, targets), got {type(examples).__name__}")
        leaves = jax.tree.leaves(examples)
        counts = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in leaves}
        if len(counts) != 1 or counts & {None, 0}:
            got = [getattr(leaf, "shape", type(leaf).__name__) for leaf in leaves]
            raise ValueError(
                f"Problem.{name}: expected arrays of as many examples each along their first axis, got {got}"
            )
        found[name] = [f"{leaf.dtype}{list(leaf.shape[1:])}" for leaf in leaves]
    if not found:
        raise ValueError(f"Problem.{field}: expected one set of examples at least, got none")
    return found


def count_examples(examples: Examples) -> int:
    """Count examples."""
    return len(jax.tree.leaves(examples)[0])


# --- named on the command line ---------------------------------------------------------------------


def made_by(name: str) -> Any:
    """Call a factory, `MODULE:FACTORY` or `FILE.py:FACTORY`; no mesh that it sets stays in force.

    The current directory is searched for a module first.

    Raises:
        ValueError: no such module or factory, or a factory that fails.
    """
    place, _, attribute = name.rpartition(":")
    of_file = place.endswith(".py")
    if of_file and not Path(place).is_file():
        raise ValueError(f"{name}: expected a Python file, found none at {place}; check the path")
    if not of_file and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with jax.set_mesh(jax.sharding.get_mesh()):
        try:
            if of_file:
                found = run_file(place)
            else:
                found = vars(importlib.import_module(place))
        except (Exception, SystemExit) as error:  # whatever the module raises
            hint = "" if of_file else "; check the module's name"
            raise ValueError(f"{name}: {type(error).__name__}: {error}{hint}") from error
        if not callable(found.get(attribute)):
            names = ", ".join(sorted(name for name, value in found.items() if callable(value) and name[0] != "_")[:8])
            raise ValueError(f"{name}: expected a function {attribute!r} in {place}, which has {names or 'none'}")
        try:
            return found[attribute]()
        except (Exception, SystemExit) as error:  # whatever the factory raises
            raise ValueError(f"{name}: the factory failed: {type(error).__name__}: {error}") from error


def made_problem(name: str) -> Problem:
    """Make the problem of a factory; a ValueError where it returns something else."""
    made = made_by(name)
    if not isinstance(made, Problem):
        raise ValueError(
            f"{name}: expected the factory to return a saap_jax.Problem, with a loss and examples, got "
            f"{type(made).__name__}"
        )
    return made


def traced_factory(name: str) -> tuple[Traced, dict[str, Verdict]]:
    """Trace what a factory returns, and try what its function does with parameters without a unit.

    The factory takes nothing and returns `(function, params, *inputs)`; arrays may be abstract (`jax.eval_shape`), so
    that a model of any size needs no memory. One that returns a `Problem`, as pruning needs it, serves too.

    Raises:
        ValueError: what `made_by` refuses, a factory that returns something else, or a function that cannot be traced.
    """
    made = made_by(name)
    if isinstance(made, Problem):
        made = (made.function, made.params, *made.example)
    if not isinstance(made, tuple | list) or len(made) < 2 or not callable(made[0]):
        got = type(made).__name__ + (f" of {len(made)}" if isinstance(made, tuple | list) else "")
        raise ValueError(f"{name}: expected the factory to return (function, params, *inputs), got {got}")
    function, params, *inputs = made
    try:
        traced = trace(function, params, *inputs)
    except Exception as error:  # whatever the function raises
        raise ValueError(f"{name}: the function cannot be traced: {type(error).__name__}: {error}") from error
    return traced, verdicts(function, traced, traced.prunable, params, *inputs)
