"""Counts, changes and lists of names in sentences, and text without hidden control characters."""

import re
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, colour, hide or reorder what follows, and halves of characters."""


def plural(number: int, noun: str) -> str:
    """Write a count with its noun.

    >>> plural(1, "variant"), plural(1200, "variant")
    ('1 variant', '1,200 variants')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str], at_most: int = 3) -> str:
    """Write the first names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def signed(value: float, digits: int) -> str:
    """Write a number with its sign, a minus being one of print.

    >>> signed(-0.52, 1), signed(3.0, 2)
    ('−0.5', '+3.00')
    """
    return f"{value:+.{digits}f}".replace("-", MINUS)


def visible(text: str) -> str:
    r"""Write text with its control characters, but for line ends and tabs, written out.

    Those are C0 and C1 (escape sequences of terminals begin with one), what reorders letters, and lone surrogates.

    >>> print(visible("a\x1b[31mb\u202e\n\ud800 é"))
    a\x1b[31mb\u202e
    \ud800 é
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
