"""How methods are written: names with options in brackets, chains and fusions of them; read to values, and written.

A call is `NAME`, `NAME(option=value, …)`, or either of a file, `FILE.py:NAME`. Values are numbers, words, tuples and
`{name: value}`. Between steps stands `>` or a comma, between the estimators of a fusion `+`, and a slash between what
scores attention and what scores the MLP. What names mean is known to who asks.
"""

import ast
import keyword
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_CALL = re.compile(r"(?:(?P<file>[^()]+\.py):)?(?P<name>[A-Za-z_][\w-]*)\s*(?:\((?P<inside>.*)\))?", re.S)

_KEYWORD = re.compile(rf"(?<![\w'\"])({'|'.join({*keyword.kwlist} - {'None', 'True', 'False'})})(?=\s*(?:,|$|\)))")
"""A word of Python's own as a value, such as `global`."""


# --- calls ---------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A name, and what stands in brackets behind it."""

    file: str
    """The Python file that has it; empty where none is named."""
    name: str
    inside: str

    def arguments(self, *, expressions: bool = False) -> tuple[list[Any], list[tuple[str, Any]]]:
        """Read the values without a name, and names with values.

        Args:
            expressions: whether a value may be a call, a fusion and the like; it is given as text.

        Raises:
            ValueError: no values, or a value that is none.
        """
        quoted = _KEYWORD.sub(r"'\1'", self.inside)
        try:
            call = ast.parse(f"_({quoted})", mode="eval").body
            if not isinstance(call, ast.Call) or not all(each.arg for each in call.keywords):
                raise ValueError("no arguments")
            given = [_value(node, expressions) for node in call.args]
            return given, [(str(each.arg), _value(each.value, expressions)) for each in call.keywords]
        except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
            raise ValueError(f"expected options in brackets, got {self.inside[:200]!r}") from None


def read_call(text: str) -> Call | None:
    """Read a name with options in brackets if any; None where the text is none.

    >>> read_call("lab/mine.py:energy(root=True)")
    Call(file='lab/mine.py', name='energy', inside='root=True')
    >>> read_call("within(protect=(0.13, -0.07), unit=mlp)").arguments()
    ([], [('protect', (0.13, -0.07)), ('unit', 'mlp')])
    """
    found = _CALL.fullmatch(text.strip())
    return found and Call(found["file"] or "", found["name"], found["inside"] or "")


def names_file(text: str) -> bool:
    """Say whether a text is the call of something in a file.

    >>> names_file("lab/mine.py:energy(root=True)"), names_file("wanda/fisher")
    (True, False)
    """
    call = read_call(text)
    return call is not None and bool(call.file)


def _value(node: ast.expr, expressions: bool) -> Any:
    """Read a value: words need no quotes."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return node.id
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, expressions)
        case ast.BinOp(op=ast.Div(), left=ast.Constant(), right=ast.Constant()):
            return node.left.value / node.right.value  # type: ignore[operator]
        case ast.Tuple() | ast.List():
            return tuple(_value(each, expressions) for each in node.elts)
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {_value(key, expressions): _value(value, expressions) for key, value in pairs if key}
    if not expressions:
        raise ValueError("an expression")
    return ast.unparse(node)


def written(value: Any) -> str:
    """Write a value as it is read.

    >>> written((0.13, -0.07)), written({"mlp": 32}), written("wanda"), written(("taylor_element(reduction='max')",))
    ('(0.13, -0.07)', '{mlp: 32}', 'wanda', '("taylor_element(reduction=\\'max\\')",)')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(key)}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(written, value)) + ("," if len(value) == 1 else "") + ")"
    plain = isinstance(value, str) and value.isidentifier() and value not in ("None", "True", "False")
    return value if plain else repr(value)


def written_call(name: str, options: Mapping[str, Any]) -> str:
    """Write a call.

    >>> written_call("rounds", {"every": 0.2}), written_call("uniform", {})
    ('rounds(every=0.2)', 'uniform')
    """
    inside = ", ".join(f"{option}={written(value)}" for option, value in options.items())
    return f"{name}({inside})" if inside else name


# --- fusions -------------------------------------------------------------------------------------


def attention_and_mlp(text: str) -> tuple[str, str]:
    """Split what scores into that of attention and that of the MLP, which are one where no slash is.

    >>> attention_and_mlp("gate_fisher/wanda+magnitude"), attention_and_mlp("lab/mine.py:energy")
    (('gate_fisher', 'wanda+magnitude'), ('lab/mine.py:energy', 'lab/mine.py:energy'))
    """
    if names_file(text):
        return text, text
    attention, slash, mlp = (part.strip() for part in text.partition("/"))
    return attention, mlp if slash else attention


def fusion_members(part: str) -> tuple[str, ...]:
    """List the estimators of a fusion; of one estimator itself.

    >>> fusion_members("gate_taylor+taylor_element")
    ('gate_taylor', 'taylor_element')
    """
    if names_file(part):
        return (part,)
    return tuple(member.strip() for member in part.split("+"))


# --- chains --------------------------------------------------------------------------------------


def split(text: str, separators: str) -> list[str]:
    """Split a text where no bracket is open.

    >>> split("within(a=(1, 2)) > uniform, none", ">,")
    ['within(a=(1, 2))', 'uniform', 'none']

    Raises:
        ValueError: brackets that do not match, or nothing between separators.
    """
    ends = [at for at, depth in enumerate(_depths(text)) if not depth and text[at] in separators]
    starts = [0, *(at + 1 for at in ends)]
    parts = [text[start:end].strip() for start, end in zip(starts, [*ends, None], strict=True)]
    if not all(parts):
        raise _not_in_order(text)
    return parts


def alternatives(text: str) -> Iterator[str]:
    """Yield a text with each of what its first braces outside of brackets hold, and so on.

    >>> list(alternatives("{wanda,magnitude} > uniform"))
    ['wanda > uniform', 'magnitude > uniform']

    Raises:
        ValueError: brackets that do not match.
    """
    depths = _depths(text)
    start = next((at for at, letter in enumerate(text) if letter == "{" and depths[at] == 1), None)
    if start is None:
        yield text
        return
    end = depths.index(0, start)
    for each in split(text[start + 1 : end], ","):
        yield from alternatives(text[:start] + each + text[end + 1 :])


def _depths(text: str) -> list[int]:
    """Count the brackets (and quotes) that are open behind each letter."""
    depths: list[int] = []
    depth = 0
    quote = ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        depths.append(depth + bool(quote))
    if min(depths, default=0) < 0 or (depths and depths[-1]):
        raise _not_in_order(text)
    return depths


def _not_in_order(text: str) -> ValueError:
    return ValueError(f"chain {text!r}: expected steps with > between them and brackets in pairs")
