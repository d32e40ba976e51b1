"""Numbers that decide: which candidate is the best, what a step of training is, which weights are solved for.

A figure of a report may be NaN or infinite, which says something there. A choice that reads NaN is none: it is neither
below nor above another number, and whatever comes first wins. So whoever chooses reads its numbers here. A candidate
whose loss is not finite comes last; where none is finite, or where each has to be, one line refuses to choose. Whose
fault that is, the model's or the text's, is said by `subjects.base.explained`.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from saap_jax.runtime.gather import fetched, first_not_finite, leaves_by_path

Numbers = TypeVar("Numbers")


class UndecidedError(ValueError):
    """A number that decides is not finite."""


def least_first(what: str, values: Sequence[float]) -> np.ndarray:
    """Order candidates by their losses, the lowest first and equal ones as they come; those not finite are last.

    Args:
        what: the losses are called in a message.

    >>> least_first("losses", [2.0, float("nan"), 1.0, 2.0]).tolist()
    [2, 0, 3, 1]

    Raises:
        UndecidedError: none of the losses is finite.
    """
    found = np.asarray(values, np.float64)
    known = np.isfinite(found)
    if len(found) and not known.any():
        raise UndecidedError(f"expected one of {len(found)} {what} to be finite, to choose by, got {found[0]} first")
    return np.argsort(np.where(known, found, np.inf), kind="stable")


def finite(what: str, numbers: Numbers) -> Numbers:
    """Return numbers, a tree of arrays, each of which has to be finite.

    Args:
        what: they are called in a message.

    Raises:
        UndecidedError: one of them is not.
    """
    arrays: Any = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), numbers)
    if (path := first_not_finite(arrays)) is not None:
        values = fetched(leaves_by_path(arrays)[path])
        got = values[~np.isfinite(values)][0]
        raise UndecidedError(f"expected finite {what}, got {got}{path and f' in {path}'}")
    return numbers
