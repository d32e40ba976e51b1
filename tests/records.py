"""What a record holds that no type of `runs.records` names."""

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from saap_jax.runs import records
from saap_jax.runs.directory import RunDirectory

OWN = (records.Configuration,)
"""What is typed only as far as it is read."""


def undeclared(value: Any, kind: Any, place: str = "") -> Iterator[str]:
    """Yield the path of each field that its type does not name."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        yield from min((list(undeclared(value, o, place)) for o in inner if not records.fault_of(value, o)), key=len)
    elif is_typeddict(kind) and kind not in OWN:
        fields = get_type_hints(kind)
        yield from (f"{place}.{name}" for name in value.keys() - fields.keys())
        for name in value.keys() & fields.keys():
            yield from undeclared(value[name], fields[name], f"{place}.{name}")
    elif get_origin(kind) is dict:
        for name, item in value.items():
            yield from undeclared(item, inner[1], f"{place}.{name}")
    elif get_origin(kind) is list:
        for item in value:
            yield from undeclared(item, inner[0], place)


def check_declared(run: RunDirectory) -> None:
    """Check that all that a run has written so far is of the types, and that these name all of it."""
    for value, kind in ((run.record, records.RunRecord), *((row, records.Row) for row in run.candidates())):
        assert not (fault := records.fault_of(value, kind)), fault
        assert not (names := sorted(undeclared(value, kind, kind.__name__))), names
