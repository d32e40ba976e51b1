"""Text without hidden control characters."""

import re

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, colour, hide or reorder what follows, and halves of characters."""


def visible(text: str) -> str:
    r"""Return text with its control characters, but for line ends and tabs, written out.

    Those are C0 and C1 (escape sequences of terminals begin with one), what reorders letters, and lone surrogates.

    >>> print(visible("a\x1b[31mb\u202e\n\ud800 é"))
    a\x1b[31mb\u202e
    \ud800 é
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
