"""Values of a model's config or metadata, checked once against a table: what is of another type is refused by key."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from saap_jax.llama.spec import BOUNDS, check_bounds
from saap_jax.runtime import words
from saap_jax.runtime.errors import shown


class Kind(NamedTuple):
    """What a value may be."""

    words: str
    """To be said behind `expected KEY to be`."""
    holds: Callable[[Any], bool]
    quantity: str | None = None
    """Of `spec.BOUNDS`, within which numbers are."""


class Values(dict[str, Any]):
    """Values by key; `where` names the file, and a missing key is refused like one of another type."""

    def __init__(self, values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, prefix: str = "") -> None:
        super().__init__(values)
        self.kinds, self.where, self.prefix = kinds, where, prefix

    def __missing__(self, key: str) -> Any:
        kind = f" to be {self.kinds[key].words}" if key in self.kinds else ""
        raise ValueError(f"{self.where}: expected {self.prefix}{key}{kind}, got None")


def checked(given: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, prefix: str = "") -> Values:
    """Return the values that are not null, those in the table of the kind that it says.

    Raises:
        ValueError: a value of another kind, or a number that is beyond what is believed.
    """
    values = Values({key: value for key, value in given.items() if value is not None}, kinds, where, prefix)
    for key in values.keys() & kinds.keys():
        kind, value = kinds[key], values[key]
        if not kind.holds(value):
            raise ValueError(f"{where}: expected {prefix}{key} to be {kind.words}, got {shown(value)}")
        if kind.quantity is not None:
            check_bounds(max(1, *value) if isinstance(value, list) else value, kind.quantity, f"{where}: {prefix}{key}")
    return values


def count(quantity: str) -> Kind:
    """A positive integer."""
    return Kind("a positive integer", lambda value: type(value) is int and value >= 1, quantity)


def counts(quantity: str) -> Kind:
    """A list of integers from 0, or one from 1 for all layers."""

    def holds(value: Any) -> bool:
        if isinstance(value, list):
            return bool(value) and all(type(each) is int and each >= 0 for each in value)
        return type(value) is int and value >= 1

    return Kind("a positive integer, or non-negative integers", holds, quantity)


def number(quantity: str) -> Kind:
    """A positive number."""

    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")

    return Kind("a positive number", holds, quantity)


def _is_token(value: Any) -> bool:
    return type(value) is int and value < BOUNDS["vocabulary"][1]


FLAG = Kind("true or false", lambda value: type(value) is bool)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TOKEN = Kind("a token id", _is_token)
TOKENS = Kind("a token id or some", lambda value: all(map(_is_token, value if isinstance(value, list) else [value])))


def per_layer(value: Any, layers: int, key: str, where: str) -> list[int]:
    """Return a number a layer, of a list or of one number for all of them."""
    if isinstance(value, list) and len(value) != layers:
        raise ValueError(f"{where}: expected {key} to be {layers} non-negative integers, got {shown(value)}")
    return value if isinstance(value, list) else [value] * layers


def some(names: list[str]) -> str:
    """Name the first three, and how many more there are; what cannot be printed, or is long, as text in quotes."""
    return words.some([name if name.isprintable() and len(name) <= 100 else shown(name) for name in names])
