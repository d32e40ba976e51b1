"""Does model A keep within limits beside B? Each limit against what was measured, in one line."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from saap_jax.config.checks import Bound
from saap_jax.evaluation.differences import Difference
from saap_jax.evaluation.scales import ACCURACY
from saap_jax.runtime.words import MINUS

_SLACK = 1e-9  # relative; a measured 105 % must not break a limit of 105 % by the last bit of a float


class Check(NamedTuple):
    """One limit beside what was measured."""

    name: str
    """Name of the limit: `max_size`."""
    what: str
    """What was measured: a metric, "weights", "forward pass"."""
    limit: str
    """The most that is allowed, with its unit."""
    measured: str
    """What was found, with its unit, and the interval where there is one."""
    passed: bool


def check_difference(what: str, difference: Difference, limit: float) -> Check:
    """Hold an increase of perplexity in percent, or a drop of accuracy in points, A's against B's, against a limit.

    The estimate decides; its interval is reported, or why there is none. A perplexity that is not finite breaks every
    limit.
    """
    unit, falls = difference.scale.units[0], difference.scale is ACCURACY
    value, measured = difference.percent[0], difference.numbers
    held = math.isfinite(difference.value)
    if not held:
        measured = "a perplexity is not finite"
    elif difference.same or not any(difference[:3]):
        exact = difference.largest == 0 or not any(difference[:3])
        value, measured = 0.0, f"0{unit}" if exact else f"0{unit} up to rounding"
    name, sign = ("max_accuracy_drop", MINUS) if falls else ("max_ppl_increase", "+")
    passed = held and (-value if falls else value) <= limit + _SLACK
    return Check(name, what, f"{sign}{limit:g}{unit}", measured, passed)


def check_bytes(name: str, what: str, bound: Bound, measured: int, baseline: int) -> Check:
    """Hold bytes against a limit in bytes, or in percent of B's."""
    share = 100 * measured / baseline
    shown = f"{mebibytes(measured)}, {share:.1f} % of {mebibytes(baseline)}"
    if bound.unit == "amount":
        return Check(name, what, mebibytes(bound.value), shown, measured <= bound.value)
    return Check(name, what, f"{bound.value:g} % of B", shown, share <= bound.value * (1 + _SLACK))


def check_seconds(percent: float, measured: float, baseline: float) -> Check:
    """Hold the time of a forward pass against a limit in percent of B's."""
    share = 100 * measured / baseline
    shown = f"{1e3 * measured:,.1f} ms, {share:.1f} % of {1e3 * baseline:,.1f} ms"
    return Check("max_latency", "forward pass", f"{percent:g} % of B", shown, share <= percent * (1 + _SLACK))


def verdict(checks: Sequence[Check]) -> str:
    """Say in one line how it went.

    >>> verdict([Check("max_size", "weights", "300.0 MiB", "432.2 MiB", False)])
    'FAIL: 1 of 1 limits is broken: max_size (weights)'
    """
    broken = [f"{check.name} ({check.what})" for check in checks if not check.passed]
    if not broken:
        return f"PASS: {'the limit holds' if len(checks) == 1 else f'all {len(checks)} limits hold'}"
    are = "is" if len(broken) == 1 else "are"
    return f"FAIL: {len(broken)} of {len(checks)} limits {are} broken: {', '.join(broken)}"


def mebibytes(value: int | float) -> str:
    """Write bytes in the unit that fits them.

    >>> mebibytes(300 * 2**20), mebibytes(1500)
    ('300.0 MiB', '1.5 KiB')
    """
    unit, size = ("MiB", 2**20) if value >= 2**20 else ("KiB", 2**10)
    return f"{value / size:,.1f} {unit}"
