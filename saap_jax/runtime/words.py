"""Counts, changes and lists of names in sentences."""

from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"


def plural(number: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "variant"), plural(1200, "variant")
    ('1 variant', '1,200 variants')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str], at_most: int = 3) -> str:
    """Return the first names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a minus being one of print.

    >>> signed(-0.52, 1), signed(3.0, 2)
    ('−0.5', '+3.00')
    """
    return f"{value:+.{digits}f}".replace("-", MINUS)
