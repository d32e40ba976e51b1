"""Cheaper checks of types at run time: jaxtyping's where a signature names arrays, beartype's alone where it does not.

jaxtyping binds the arguments of every call to keep the sizes of named axes together, and makes two more functions of
each that is defined, also of those that are defined in a call. Where no axis is named beartype finds the same faults at
a fraction of the cost, and where nothing is annotated there are none to find.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

_CONF = beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError)
_UNKNOWN = str | typing.ForwardRef | typing.TypeVar | typing.ParamSpec
"""Hints that jaxtyping looks up, or that may stand for an array."""


def names_arrays(hint: Any) -> bool:
    """Whether a hint has arrays of jaxtyping in it, or may have."""
    if isinstance(hint, list | tuple):
        return any(map(names_arrays, hint))
    if isinstance(hint, _UNKNOWN | type(jaxtyping.PyTree)):
        return True
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        return issubclass(hint, jaxtyping.AbstractArray)
    return any(map(names_arrays, typing.get_args(hint)))


def cheaper(jaxtyped: Callable) -> Callable:
    """Make `jaxtyping.jaxtyped` leave to beartype what names no arrays."""

    def decorate(checked: Any, **options: Any) -> Any:
        if inspect.isclass(checked) and dataclasses.is_dataclass(checked):
            if isinstance(init := vars(checked).get("__init__"), types.FunctionType):
                checked.__init__ = init if hasattr(init, "__wrapped__") else decorate(init, **options)
            return checked
        if not inspect.isfunction(checked) or inspect.isgeneratorfunction(checked):
            return jaxtyped(checked, **options)
        if not checked.__annotations__:
            return checked
        if any(map(names_arrays, checked.__annotations__.values())):
            return jaxtyped(checked, **options)
        by_beartype = beartype.beartype(conf=_CONF)(checked)

        @functools.wraps(checked)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            return (checked if jaxtyping.config.jaxtyping_disable else by_beartype)(*args, **kwargs)

        return call

    return lambda checked=None, **options: (
        functools.partial(decorate, **options) if checked is None else decorate(checked, **options)
    )


jaxtyping.jaxtyped = cheaper(jaxtyping.jaxtyped)
