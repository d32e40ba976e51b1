"""What the fields of configurations are checked for: each check raises ValueError, the field and the value named."""

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin


def check_run_name(name: str) -> None:
    """Raise ValueError unless `name` is a plain directory name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in ("NaN", "Infinity"):  # numbers in run.json
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-', and no number's name, got {name!r}")


def check_ratios(ratios: tuple[float, ...], name: str = "ratios") -> None:
    """Raise ValueError unless `ratios` is a non-empty tuple of distinct numbers in [0, 1)."""
    if not ratios:
        raise ValueError(f"{name}: expected at least one number in [0, 1), got none")
    for ratio in ratios:
        if not 0 <= ratio < 1:
            numbers = "a number" if len(ratios) == 1 else "numbers"
            raise ValueError(f"{name}: expected {numbers} in [0, 1), got {ratio}{meant(*ratios)}")
    if len(set(ratios)) < len(ratios):
        raise ValueError(f"{name}: expected each once, got {list(ratios)}")


def meant(*values: float) -> str:
    """Return a question for the shares that somebody meant who gave per cent; empty where none looks like that.

    >>> meant(30.0), meant(0.2, 50.0), meant(1.0), meant(-0.1)
    ('; did you mean 0.3?', '; did you mean 0.2 0.5?', '', '')
    """
    if not any(1 < value <= 100 for value in values):
        return ""
    return f"; did you mean {' '.join(f'{value / 100 if 1 < value <= 100 else value:g}' for value in values)}?"


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise ValueError(f"{name}: expected a number in [0, 2^32), got {value}")


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}{meant(value)}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError unless `value` is one of the `choices`, a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")


def check_choices(name: str, config: Any) -> None:
    """Check all fields of type Literal."""
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal:
            check_choice(f"{name}.{field.name}", getattr(config, field.name), field.type)
