"""Estimators and statistics by name: add yours with one line here, by `register`, or as a plugin.

A plugin is a package with entry points of the group `saap_jax.estimators`: the name of an estimator -> its factory.
They are looked up when a name is asked for that is not known otherwise. `FILE.py:FACTORY` names one in a file.
"""

import difflib
import functools
import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from saap_jax.checks import check_value
from saap_jax.estimation import activations, gates, hessian, reconstruction, squares, taylor
from saap_jax.estimation.base import Estimator, Statistic
from saap_jax.estimation.objectives import OBJECTIVES
from saap_jax.runtime.digests import code_digest
from saap_jax.runtime.sources import run_file, source_digest
from saap_jax.syntax import Call, read_call

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    factory.__name__: factory
    for factory in (
        *(taylor.random, taylor.magnitude, taylor.taylor_vector, taylor.taylor_element, taylor.taylor_element_second),
        *(taylor.fisher, gates.gate_taylor, gates.gate_taylor_signed, gates.gate_fisher, hessian.gate_hessian),
        *(activations.wanda, activations.fluctuation, activations.activation_frequency, activations.activation_norm),
        *(activations.reap, activations.block_influence, reconstruction.obs, reconstruction.leverage),
    )
}
"""Name -> factory with keyword-only hyper-parameters."""

_GRADIENTS = taylor.WEIGHT_GRADIENT, squares.SQUARED_WEIGHT_GRADIENT, gates.GATE_GRADIENT

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        *_GRADIENTS,
        hessian.GATE_HESSIAN,
        activations.ACTIVATION_MOMENTS,
        activations.ACTIVATION_NORMS,
        activations.ACTIVATION_USAGE,
        activations.WRITTEN_NORMS,
        activations.BLOCK_CHANGE,
        reconstruction.SECOND_MOMENT,
        *(each.of_objective(objective) for objective in OBJECTIVES[1:] for each in _GRADIENTS),
    )
}
"""Name in files and messages -> statistic; each stands beside the formulas that use it."""

PLUGINS = "saap_jax.estimators"
"""Group of the entry points by which packages add estimators."""

Factory = Callable[..., Estimator]
Made = TypeVar("Made")


def register(name: str, factory: Factory) -> Factory:
    """Add an estimator, so that it can be named wherever estimators are: in calls, fusions and configurations.

    Args:
        name: an identifier that no estimator has yet.
        factory: makes the estimator from hyper-parameters, keyword-only and annotated.

    >>> def loud():
    ...     return make_estimator("wanda")
    >>> register("loud", loud) is ESTIMATORS.pop("loud")
    True

    Raises:
        ValueError: the name is none, or is taken by another factory.
    """
    if not name.isidentifier() or name == "saap":
        raise ValueError(f"register: expected an identifier other than 'saap', got {name!r}")
    if ESTIMATORS.get(name, factory) is not factory:
        raise ValueError(f"register: an estimator {name!r} exists already; choose another name")
    code_digest(factory)  # of the file as it is now, whatever becomes of it while this process runs
    ESTIMATORS[name] = factory
    return factory


def make_estimators(
    texts: Iterable[str], given: Mapping[str, Estimator] = MappingProxyType({})
) -> dict[str, Estimator]:
    """Make estimators keyed by the text that names them, but for those that are `given`; none may be named twice."""
    estimators: dict[str, Estimator] = {}
    for text in texts:
        if text in estimators:
            raise ValueError(f"estimator {text!r} is named twice")
        estimators[text] = given[text] if text in given else make_estimator(text)
    if not estimators:
        raise ValueError(f"expected at least one estimator of {', '.join(ESTIMATORS)}, got none")
    return estimators


def make_estimator(text: str) -> Estimator:
    """Make an estimator from its name, with hyper-parameters in brackets if any.

    >>> sorted(make_estimator("taylor_element(reduction='max')").needs)
    [<Statistic weight_gradient>]

    Raises:
        ValueError: an unknown name (the nearest one is suggested), an unknown hyper-parameter, a value that is none of
            it, or a malformed call.
    """
    name, options, factory = _found(text)
    if factory is None:
        near = difflib.get_close_matches(name, ESTIMATORS, n=1, cutoff=0.0)
        raise ValueError(f"unknown estimator {name!r}; did you mean {near[0]!r}? Known: {', '.join(ESTIMATORS)}")
    made = _called(name, factory, options)
    if not isinstance(made, Estimator):
        raise ValueError(f"estimator {text!r}: expected a factory of an Estimator, got {type(made).__name__} from it")
    return made


def call_factory(text: str, factories: Mapping[str, Callable[..., Made]]) -> Made:
    """Make what a name stands for by one of some factories, with hyper-parameters in brackets if any.

    Raises:
        ValueError: an unknown hyper-parameter, a value that is none of it, or a malformed call.
        KeyError: another name.
    """
    call, options = _read(text)
    return _called(call.name, factories[call.name], options)


def code_of(text: str) -> str:
    """Digest the code of an estimator that a name stands for; that of the package where it is its own."""
    return code_digest(_found(text)[2] or code_of, _read(text)[0].file)


def code_of_statistic(statistic: Statistic) -> str:
    """Digest the code by which a statistic is observed; that of the package where it is its own."""
    functions = [each for each in (*vars(statistic).values(), *statistic.accumulation) if callable(each)]
    codes = sorted({code_digest(each) for each in functions} - {""})
    if codes:
        return hashlib.sha256("".join(codes).encode()).hexdigest()
    return ""


# --- names ---------------------------------------------------------------------------------------


def _found(text: str) -> tuple[str, dict[str, Any], Factory | None]:
    """Find name, hyper-parameters and factory of an estimator; no factory where the name is unknown."""
    (file, name, _), options = _read(text)
    if file:
        return name, options, from_file(file, name)
    for point in () if name in ESTIMATORS else importlib.metadata.entry_points(group=PLUGINS, name=name):
        try:
            register(name, point.load())
        except Exception as error:  # whatever the plugin raises
            package = point.dist.name if point.dist else point.value
            raise ValueError(
                f"estimator {name!r}: the plugin {package} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    return name, options, ESTIMATORS.get(name)


def _read(text: str) -> tuple[Call, dict[str, Any]]:
    """Read the call of an estimator, and its hyper-parameters.

    Raises:
        ValueError: it is none, or has values without a name.
    """
    said = f"estimator: expected NAME or NAME(option=value, …), and > between steps, got {text[:200]!r}"
    call = read_call(text)
    if call is None:
        raise ValueError(said)
    try:
        given, options = call.arguments()
    except ValueError:
        raise ValueError(said) from None
    if given:
        raise ValueError(said)
    return call, dict(options)


def from_file(file: str, name: str) -> Any:
    """Run a Python file and take what it calls by a name: the factory of an estimator, or a step.

    Raises:
        ValueError: no such file, one that fails, or nothing that can be called.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"estimator {file}:{name}: expected a Python file, found none at {path}; check the path")
    digest = source_digest(path)
    if _namespaces.get(path, ("", {}))[0] != digest:  # the file, or what it imports from beside it, is new or other
        try:
            _namespaces[path] = digest, run_file(path)
        except Exception as error:  # whatever the file raises
            raise ValueError(f"estimator {file}:{name}: the file fails: {type(error).__name__}: {error}") from error
    made = _namespaces[path][1].get(name)
    if not callable(made):
        raise ValueError(f"estimator {file}:{name}: expected a function {name} in the file, found none")
    code_digest(made, file, digest)
    return made


_namespaces: dict[Path, tuple[str, dict[str, Any]]] = {}
"""Digest and names of each file as it was run last; not of older ones, since modules that they import are gone."""


def _called(name: str, factory: Callable[..., Made], options: dict[str, Any]) -> Made:
    try:
        signature = inspect.signature(factory, eval_str=True)
    except NameError:  # annotations with names that are there for type checkers alone
        signature = inspect.signature(factory)
    known = signature.parameters
    for option, value in options.items():
        if option not in known:
            if known:
                takes = f"takes {', '.join(known)}"
            else:
                takes = "takes none"
            raise ValueError(f"estimator {name!r}: unknown hyper-parameter {option!r}; it {takes}")
        kind = known[option].annotation
        if kind is not inspect.Parameter.empty and not isinstance(kind, str):
            check_value(f"estimator {name!r}: {option}", value, kind)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"estimator {name!r}: {error}") from None
    try:
        return _made(factory, **options)
    except TypeError:  # an option that cannot be hashed
        return factory(**options)


@functools.cache
def _made(factory: Callable[..., Made], **options: Hashable) -> Made:
    """Make an estimator once: its formula, made again, would be compiled again."""
    return factory(**options)
