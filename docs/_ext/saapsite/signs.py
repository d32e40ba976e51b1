"""Signs of a docstring that reStructuredText would read as markup. Needs no Sphinx."""

import re

_CODE = re.compile(r"(``.+?``|`[^`]+`)", re.S)


def escaped(text: str) -> str:
    """Return text whose signs |, * and trailing _ are signs, and whose single backquotes are code.

    >>> print(escaped("Score by |w| of `a|b`, 2 * w_."))
    Score by \\|w\\| of ``a|b``, 2 \\* w\\_.
    """
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([|*\\]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part if part.startswith("``") else f"`{part}`" for part in parts[1::2]]
    return "".join(parts)
