"""Types of the fields of configurations, checks that stand beside them, and amounts as they are written.

Every message names the field, what was expected and what was given, in one line. Dataclasses of pydantic say it in four
lines with an address, take no list for a tuple where they are strict, and import for 0.2 s; what options need beside
them, and what was meant by 30 for a share, would be ours all the same.
"""

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from saap_jax.errors import shown

Check = Callable[[str, Any], object]
"""Raises ValueError where the value of a field, which comes with its name, is not a good one."""


class Beside(NamedTuple):
    """What options need beside them where they are not as usual, since they change nothing without."""

    names: str
    """Of the fields, also of those of parts (`training.patience`), with blanks between."""
    said: str
    holds: Callable[[Any], object]
    """Says of the configuration whether it is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration whose fields are checked when it is built: by their types, and by what `Annotated` adds to those.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Sizes(Checked):
    ...     ratios: tuple[float, ...] = (0.2,)
    ...     rows: Annotated[int, at_least(1)] = 8
    >>> Sizes(ratios=[1, 0.5]).rows  # a list counts as a tuple, a whole number as a float
    8
    >>> Sizes(ratios="0.2")
    Traceback (most recent call last):
    ValueError: ratios: expected tuple[float, ...], got '0.2'
    >>> Sizes(rows=0)
    Traceback (most recent call last):
    ValueError: rows: expected at least 1, got 0
    """

    PLACE = ""
    """What stands before the names of the fields in messages."""
    BESIDE: ClassVar[tuple[Beside, ...]] = ()

    def __post_init__(self) -> None:
        check_values(type(self), {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}, self.PLACE)
        check_beside(self)


def check_beside(config: Checked) -> None:
    """Raise ValueError for an option that lacks what its class, or one above that, says it needs beside it."""
    for kind in type(config).__mro__:
        for beside in vars(kind).get("BESIDE", ()):
            if not beside.holds(config):
                _check_default(config, beside)


def _check_default(config: Checked, beside: Beside) -> None:
    """Raise ValueError for an option of `beside` that is not as usual."""
    for name in beside.names.split():
        value = operator.attrgetter(name)(config)
        if value != operator.attrgetter(name)(type(config)):
            got = f"got {shown(value)}; or leave it out"
            raise ValueError(f"{config.PLACE}{name}: expected {beside.said} beside it, {got}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def check_values(kind: type, values: Mapping[str, Any], place: str = "") -> None:
    """Check values by the fields of a class; a default of it is a good one.

    Raises:
        ValueError: the first that is not.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in values.items():
        hint = _hints(kind)[name]
        if get_origin(hint) is Annotated and value == defaults[name]:
            hint = get_args(hint)[0]
        check_value(f"{place}{name}", value, hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError for a value that is none of what a type says, and what `Annotated` adds to it."""
    hint, *checks = get_args(hint) if get_origin(hint) is Annotated else [hint]
    if not _is(value, hint):
        raise ValueError(f"{name}: expected {_named(hint)}, got {shown(value)}")
    for check in checks:
        if callable(check):  # others are tyro's
            check(name, value)


def _named(hint: Any) -> str:
    """Name what a type takes."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _is(value: Any, hint: Any) -> bool:
    """Say whether a value is of a type: a list counts as a tuple, a whole number as a float, True as no number."""
    origin = get_origin(hint)
    inner = get_args(hint)
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
    if hint in (int, bool, str):
        return type(value) is hint
    if hint in (None, type(None)):
        return value is None
    return hint is Any or isinstance(value, origin or hint)


# --- checks --------------------------------------------------------------------------------------


def number(said: str, holds: Callable[[Any], bool]) -> Check:
    """Make the check that a number, or each of several, is one that `said` names and that holds; None passes."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            several = [*value.values()]
        else:
            several = value
        for each in several if isinstance(several, tuple | list) else (several,):
            if each is not None and not holds(each):
                raise ValueError(f"{name}: expected {said}, got {each}{meant(float(each))}")

    return check


def at_least(least: int) -> Check:
    """Make the check that a number, or each of several, is at least so large."""
    return number(f"at least {least}", lambda value: value >= least)


check_seed = number("a number in [0, 2^32)", lambda value: 0 <= value < 2**32)
check_share = number("a number in [0, 1]", lambda value: 0 <= value <= 1)
check_positive = number("a number above 0", lambda value: 0 < value < math.inf)
check_not_negative = number("a number of at least 0", lambda value: 0 <= value < math.inf)


def check_several(name: str, values: Any) -> None:
    """Raise ValueError unless there is at least one value, and each once."""
    if not values or len(set(values)) < len(values):
        got = ", ".join(map(str, values)) or "none"
        raise ValueError(f"{name}: expected at least one, each once, got {got}")


def check_run_name(name: str, value: str) -> None:
    """Raise ValueError unless `value` is a plain directory name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or value in ("NaN", "Infinity"):  # numbers in run.json
        raise ValueError(f"{name}: expected letters, digits, '.', '_' and '-', and no number's name, got {value!r}")


def check_ratios(name: str, value: Any) -> None:
    """Raise ValueError unless there is a number in [0, 1), or several, each once."""
    if isinstance(value, tuple | list):
        ratios = value
    else:
        ratios = (value,)
    check_several(name, [f"{ratio:g}" for ratio in ratios])  # as names of candidates tell them
    for ratio in ratios:
        if not 0 <= ratio < 1:
            numbers = "a number" if len(ratios) == 1 else "numbers"
            raise ValueError(f"{name}: expected {numbers} in [0, 1), got {ratio}{meant(*ratios)}")


def meant(*values: float) -> str:
    """Ask whether shares were meant where per cent are given; empty where they do not look like that.

    >>> meant(30.0), meant(0.2, 50.0), meant(1.0), meant(-0.1)
    ('; did you mean 0.3?', '; did you mean 0.2 0.5?', '', '')
    """
    if not any(1 < value <= 100 for value in values):
        return ""
    return f"; did you mean {' '.join(f'{value / 100 if 1 < value <= 100 else value:g}' for value in values)}?"


def is_remote(name: str | Path) -> bool:
    """Say whether a name is an address, and no path.

    >>> is_remote("gs://bucket/model"), is_remote("models/small"), is_remote("mine.py:problem")
    (True, False, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]*://", str(name)) is not None


def check_local(field: str, name: str | Path) -> Path:
    """Resolve the path in a field.

    Raises:
        ValueError: it is an address.
    """
    if is_remote(name):
        hint = "give a path, and copy what lies there (gcloud storage rsync)"
        raise ValueError(f"{field}: expected a path of this machine, got the address {name}; {hint}")
    return Path(name)


Natural = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]
Seed = Annotated[int, check_seed]
Share = Annotated[float, check_share]
Ratios = Annotated[tuple[float, ...], check_ratios]
RunName = Annotated[str, check_run_name]
Local = Annotated[str, check_local]
Names = Annotated[tuple[str, ...], check_several]


# --- amounts -------------------------------------------------------------------------------------

_NUMBER = r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*"
BYTES: dict[str, float] = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


class Bound(NamedTuple):
    """The most, or the least, that something may take."""

    value: float
    unit: Literal["percent", "amount"]
    """Percent of the other model's, or whatever is counted."""


def read_percent(name: str, text: str) -> float:
    """Read a percentage, which carries its sign so that nobody takes it for a share.

    >>> read_percent("max_ppl_increase", "5 %")
    5.0
    """
    match = re.fullmatch(_NUMBER + "(%?)", text.rstrip())
    if not match or not math.isfinite(share := float(match[1])):
        raise ValueError(f"{name}: expected a percentage of at least 0, such as 5%, got {shown(text)}")
    if not match[2]:
        other = ""
        if share <= 1:
            other = f", or {100 * share:g}% if it is a share"
        raise ValueError(f"{name}: expected a percentage with its sign, got {shown(text)}; write {match[1]}%{other}")
    return share


def read_workload(name: str, text: str) -> tuple[int, int]:
    """Read rows and tokens of each.

    >>> read_workload("at", "8x4096")
    (8, 4096)
    """
    if not (match := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)):
        raise ValueError(f"{name}: expected rows and tokens of each, such as 8x4096, got {shown(text)}")
    return int(match[1]), int(match[2])


def read_bound(name: str, text: str, units: Mapping[str, float] = BYTES, example: str = "300MiB") -> Bound:
    """Read a bound: a percentage of the other model's, or an amount with one of some units (one may be empty).

    >>> read_bound("max_size", "80%"), read_bound("max_size", "1.5 kB")
    (Bound(value=80.0, unit='percent'), Bound(value=1500.0, unit='amount'))
    """
    if text.rstrip().endswith("%"):
        return Bound(read_percent(name, text), "percent")
    match = re.fullmatch(_NUMBER + "([A-Za-z]*)", text.rstrip())
    sizes = {unit.lower(): size for unit, size in units.items()}
    if match and 0 < (amount := float(match[1]) * sizes.get(match[2].lower(), math.nan)) < math.inf:
        return Bound(amount, "amount")
    named = ", ".join(unit for unit in units if unit)
    raise ValueError(
        f"{name}: expected a percentage of the other model's, such as 80%, or a number above 0"
        f"{f' with one of the units {named}' if named else ''}, such as {example}, got {shown(text)}"
    )
