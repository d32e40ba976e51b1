"""A researcher's own model, named on the command line as `module:factory` or `file.py:factory`."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from saap_jax.runtime.files import run_file
from saap_jax.runtime.mesh import automatic
from saap_jax.trace.own_code import Verdict, verdicts
from saap_jax.trace.problem import Problem
from saap_jax.trace.trace import Traced, trace


class Found(NamedTuple):
    """What a factory's function holds."""

    traced: Traced
    verdicts: dict[str, Verdict]
    """What the function itself does with parameters without a unit, of each prunable structure."""


def traced_factory(name: str) -> Found:
    """Trace what a factory returns: a function of parameters and inputs, and both.

    The factory takes nothing and returns `(function, params, *inputs)`; arrays may be abstract (`jax.eval_shape`), so
    that a model of any size needs no memory. One that returns a `Problem`, as pruning needs it, serves too.

    Raises:
        ValueError: no such module or factory, a factory that fails or returns something else, or a function that cannot
            be traced.
    """
    made = made_by(name)
    if isinstance(made, Problem):
        made = made.without_explicit_axes()
        inputs, _ = made.row(made.first_set, 0)
        made = (made.function, made.params, *made.inputs(inputs))
    if not isinstance(made, tuple | list) or len(made) < 2 or not callable(made[0]):
        raise ValueError(
            f"{name}: expected the factory to return (function, params, *inputs), got {type(made).__name__}"
            + (f" of {len(made)}" if isinstance(made, tuple | list) else "")
        )
    function, (params, *inputs) = made[0], automatic(made[1:])
    try:
        traced = trace(function, params, *inputs)
    except Exception as error:  # whatever the function raises
        raise ValueError(f"{name}: the function cannot be traced: {type(error).__name__}: {error}") from error
    return Found(traced, verdicts(function, traced, traced.prunable, params, *inputs))


def made_problem(name: str) -> Problem:
    """Make the problem of a factory.

    Raises:
        ValueError: no such module or factory, or a factory that fails or returns something else.
    """
    made = made_by(name)
    if not isinstance(made, Problem):
        raise ValueError(
            f"{name}: expected the factory to return a saap_jax.Problem, with a loss and examples, got "
            f"{type(made).__name__}"
        )
    return made


def made_by(name: str) -> Any:
    """Call a factory, `MODULE:FACTORY` or `FILE.py:FACTORY`; no mesh that it sets stays in force.

    The current directory is searched for a module first.
    """
    place, _, attribute = name.rpartition(":")
    of_file = place.endswith(".py")
    if of_file and not Path(place).is_file():
        raise ValueError(f"{name}: expected a Python file, found none at {place}; check the path")
    if not of_file and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with jax.set_mesh(jax.sharding.get_mesh()):
        try:
            found = run_file(place) if of_file else vars(importlib.import_module(place))
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
