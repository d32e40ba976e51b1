"""Values of a `config.json`: what is of another type, or beyond what is believed, is refused by key and file."""

from typing import Any

from saap_jax.formats.json_files import shown
from saap_jax.llama.spec import BOUNDS, check_bounds
from saap_jax.runtime import words


def some(names: list[str]) -> str:
    """Name the first three, and how many more there are; what cannot be printed, or is long, as text in quotes."""
    return words.some([name if name.isprintable() and len(name) <= 100 else shown(name) for name in names])


def integer(config: dict[str, Any], key: str, where: str, quantity: str, default: int | None = None) -> int:
    """Return a positive integer within the bounds of its quantity; `default` where there is none."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: expected {key} to be a positive integer, got {shown(value)}")
    check_bounds(value, quantity, f"{where}: {key}")
    return value


def number(config: dict[str, Any], key: str, where: str, quantity: str, default: float | None = None) -> float:
    """Return a positive number within the bounds of its quantity; `default` where there is none."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{where}: expected {key} to be a positive number, got {shown(value)}")
    check_bounds(value, quantity, f"{where}: {key}")
    return float(value)


def flag(config: dict[str, Any], key: str, where: str, default: bool = False) -> bool:
    """Return what is true or false; `default` where there is nothing."""
    value = config.get(key)
    value = default if value is None else value
    if value is not None and type(value) is not bool:
        raise ValueError(f"{where}: expected {key} to be true or false, got {shown(value)}")
    return bool(value)


def token(value: Any, what: str) -> int | None:
    """Return a token id; None where there is none, or a negative number stands for that."""
    if value is not None and (type(value) is not int or value >= BOUNDS["vocabulary"][1]):
        raise ValueError(f"{what}: expected a token id, got {shown(value)}")
    return None if value is None or value < 0 else value
