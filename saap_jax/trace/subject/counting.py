"""How many parameters of a traced model belong to structures, and go with units, each counted once."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from saap_jax.trace.removal import kept_shapes
from saap_jax.trace.subject.problem import TracedProblem


def prunable_parameters(subject: TracedProblem) -> int:
    """Count the parameters that belong to a structure that may be pruned, each once."""
    covered: dict[str, dict[int, set[int]]] = {}
    for structure in subject.structures:
        for member in structure.members:
            held = covered.setdefault(member.path, {}).setdefault(member.axis, set())
            for place in member.places:
                held.update(index for unit in range(structure.units) for index in place.indices(unit))
    total = 0
    for path, axes in covered.items():
        shape = subject.traced.shapes[path]
        free = [size - len(axes.get(axis, ())) for axis, size in enumerate(shape)]
        total += _product(shape) - _product(free)
    return total


def removed_parameters(subject: TracedProblem, keep: Mapping[str, Any]) -> int:
    """Count the parameters that a cut removes."""
    after = kept_shapes(subject.traced, subject.by_copies(keep))
    return sum(_product(shape) - _product(after[path]) for path, shape in subject.traced.shapes.items())


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count all parameters of a model."""
    return sum(map(_product, shapes.values()))


def _product(sizes: Iterable[int]) -> int:
    return int(np.prod(list(sizes), dtype=np.int64))
