"""Are the fields of a configuration of the types that it declares? A Python file may put anything there."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from saap_jax.config.checks import check_choice
from saap_jax.runtime.errors import shown


def check_types(config: Any, place: str = "") -> None:
    """Raise ValueError for the first field, also of a configuration within, whose value is not of its type.

    A list counts as a tuple, and a whole number as a float.

    >>> @dataclasses.dataclass
    ... class Sizes:
    ...     ratios: tuple[float, ...] = (0.2,)
    >>> check_types(Sizes(ratios=[1, 0.5]))
    >>> check_types(Sizes(ratios="0.2"))
    Traceback (most recent call last):
    ValueError: ratios: expected tuple[float, ...], got '0.2'
    """
    check_values(type(config), {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, place)


def check_values(kind: type, values: Mapping[str, Any], place: str = "") -> None:
    """Do what `check_types` does of values by field, of which a configuration is to be made."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        hint = hints[name]
        if not _is(value, hint):
            if typing.get_origin(hint) is Literal and isinstance(value, str):
                check_choice(f"{place}{name}", value, hint)
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{place}{name}: expected {expected}, got {shown(value)}")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{place}{name}.")


def _is(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if inner[-1] is Ellipsis:
            return all(_is(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(_is, value, inner))
    if origin is dict:
        return isinstance(value, Mapping) and all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in value.items())
    if hint is float and type(value) is int:
        return abs(value) < 2**53
    if hint in (int, float, bool, str):
        return type(value) is hint
    return value is None if hint in (None, type(None)) else hint is Any or isinstance(value, hint)
