"""How percentages, bytes and points are written in a configuration or on the command line."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from saap_jax.runtime.errors import shown

_NUMBER = r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*"
BYTES: dict[str, float] = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


class Bound(NamedTuple):
    """The most, or the least, that something may take."""

    value: float
    unit: Literal["percent", "bytes", "amount"]
    """Percent of the baseline's, or bytes, or whatever is counted."""


def read_percent(name: str, text: Any) -> float:
    """Return a percentage, which carries its sign so that nobody takes a share for it.

    >>> read_percent("max_ppl_increase", "5 %")
    5.0
    """
    written = text if isinstance(text, str) else repr(text) if _is_number(text) else ""
    match = re.fullmatch(_NUMBER + "%?", written)
    if not match or not math.isfinite(float(match[1])):
        raise ValueError(f"{name}: expected a percentage of at least 0, such as 5%, got {shown(text)}")
    if not written.rstrip().endswith("%"):
        share = float(match[1])
        other = f", or {100 * share:g}% if it is a share" if share <= 1 else ""
        raise ValueError(f"{name}: expected a percentage with its sign, got {shown(text)}; write {match[1]}%{other}")
    return float(match[1])


def read_bound(name: str, text: Any) -> Bound:
    """Return a bound on bytes: a percentage of the baseline's, or a number with a unit.

    >>> read_bound("max_size", "80%"), read_bound("max_size", "1.5 kB")
    (Bound(value=80.0, unit='percent'), Bound(value=1500.0, unit='bytes'))
    """
    match = re.fullmatch(_NUMBER + "([A-Za-z]+)", text.rstrip() if isinstance(text, str) else "")
    units = {unit.lower(): size for unit, size in BYTES.items()}
    if match and math.isfinite(size := float(match[1]) * units.get(match[2].lower(), math.nan)):
        return Bound(size, "bytes")
    if isinstance(text, str) and text.rstrip().endswith("%"):
        return Bound(read_percent(name, text), "percent")
    raise ValueError(
        f"{name}: expected a percentage of the baseline's, such as 80%, or a number with one of the units "
        f"{', '.join(BYTES)}, such as 300MiB, got {shown(text)}"
    )


def read_points(name: str, value: Any) -> float:
    """Return a number of points, the percent of a task's items."""
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name}: expected points, a number of at least 0, got {shown(value)}")
    return float(value)


def _is_number(value: Any) -> bool:
    """Say whether a value is a number that a float can be."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**53)


def read_limit(name: str, text: Any, units: Mapping[str, float], example: str) -> Bound:
    """Return a limit: a percentage of the baseline's, or an amount with one of some units, of which one may be empty.

    >>> read_limit("latency", "250 ms", {"ms": 1e-3, "s": 1.0}, "250ms")
    Bound(value=0.25, unit='amount')
    """
    if isinstance(text, str) and text.rstrip().endswith("%"):
        return Bound(read_percent(name, text), "percent")
    match = re.fullmatch(_NUMBER + "([A-Za-z]*)", text.rstrip() if isinstance(text, str) else "")
    if match and 0 < (amount := float(match[1]) * units.get(match[2], math.nan)) < math.inf:
        return Bound(amount, "amount")
    named = ", ".join(unit for unit in units if unit)
    raise ValueError(
        f"{name}: expected a percentage of the unpruned model's, such as 80%, or a number above 0"
        f"{f' with one of the units {named}' if named else ''}, such as {example}, got {shown(text)}"
    )
