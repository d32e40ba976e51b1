"""The smallest ratio at which something holds."""

from collections.abc import Callable

from saap_jax.selection.search import Selection
from saap_jax.types import Keep

TOLERANCE = 0.001
"""How exactly the smallest ratio that meets the targets is found."""


def bisected(low: float, high: float, select: Callable[[float], Selection], holds: Callable[[Keep], bool]) -> Selection:
    """Return the selection at the smallest ratio that holds, where that of `high` does."""
    if holds(select(low).keep):
        return select(low)
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(select(middle).keep) else (middle, high)
    return select(high)
