"""Names of structures with `*` and `?`, as patterns of file names have them."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a pattern stands for: the one that it is, or all that fit; brackets mean themselves.

    >>> matching("layers/*/up[1]", ["layers/0/up[1]", "layers/1/up[1]", "layers/1/up[0]"])
    ['layers/0/up[1]', 'layers/1/up[1]']
    """
    if pattern in names:
        return [pattern]
    return fnmatch.filter(names, pattern.replace("[", "[[]"))


def by_name(
    field: str, given: Mapping[str, T], names: Sequence[str], hints: Mapping[str, Any] | None = None
) -> dict[str, T]:
    """Return what is asked for each name; of two patterns that fit one name, the later holds, but a name goes first.

    Raises:
        ValueError: a pattern that fits no name.
    """
    found: dict[str, T] = {}
    for pattern, value in sorted(given.items(), key=lambda item: item[0] in names):
        fitting = matching(pattern, names)
        if not fitting:
            hint = f"; {pattern} {hints[pattern]}" if hints and pattern in hints else ""
            raise ValueError(
                f"{field}: expected names of structures {', '.join(names)}, or patterns of them, got {pattern}{hint}"
            )
        found.update(dict.fromkeys(fitting, value))
    return found
