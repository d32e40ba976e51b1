"""Names of structures: those of equal layers as one pattern, and what a pattern with `*` and `?` stands for."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from saap_jax.trace.trace import TracedStructure

T = TypeVar("T")


def group_of(name: str) -> str:
    """Put `*` for each number of the path in a structure's name; equal layers have one.

    >>> group_of("layers/11/mlp/up[1].2")
    'layers/*/mlp/up[1].2'
    """
    path, bracket, rest = name.partition("[")
    return re.sub(r"\d+", "*", path) + bracket + rest


def groups_of(structures: Sequence[TracedStructure]) -> dict[str, list[TracedStructure]]:
    """Group structures that are alike but for numbers in the paths of their members, by their names' pattern."""
    found: dict[Any, list[TracedStructure]] = {}
    for each in structures:
        members = tuple((group_of(m.path), m.axis, m.places, m.shared) for m in each.members)
        key = (group_of(each.name), each.units, each.copied, each.prunable, each.normalised == (), len(each.gates))
        found.setdefault((key, tuple(dict.fromkeys(members))), []).append(each)
    named: dict[str, list[TracedStructure]] = {}
    for group in found.values():
        name = group_of(group[0].name) if len(group) > 1 else group[0].name
        taken = any(name == other or (name in other and len(group) > 1) for other in named)
        named[f"{name} ({group[0].name})" if taken else name] = group
    return named


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Choose the names that a pattern stands for: the one that it is, or all that fit; brackets mean themselves.

    >>> matching("layers/*/up[1]", ["layers/0/up[1]", "layers/1/up[1]", "layers/1/up[0]"])
    ['layers/0/up[1]', 'layers/1/up[1]']
    """
    if pattern in names:
        return [pattern]
    return fnmatch.filter(names, pattern.replace("[", "[[]"))


def by_name(
    field: str, given: Mapping[str, T], names: Sequence[str], hints: Mapping[str, Any] | None = None
) -> dict[str, T]:
    """Tell what is asked for each name; of two patterns that fit one name, the later holds, but a name goes first.

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
