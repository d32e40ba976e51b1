"""Docstrings for Sphinx: signatures as they are written, and signs that reStructuredText would read as markup."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

from saapsite.signs import escaped


def written_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Return the signature of a function, or of what makes an object, as its source has it.

    Sphinx would spell out aliases such as `Keep`. Dataclasses and tuples have none: their fields are listed.
    """
    if inspect.isclass(value):
        made = vars(value).get("__init__")
        if dataclasses.is_dataclass(value) or not inspect.isfunction(made):
            return ("", "") if signature else None
        value, what = made, "method"
    function = inspect.unwrap(value) if callable(value) else None
    if not inspect.isfunction(function):
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    if what == "method" and not any(ast.unparse(each) == "staticmethod" for each in node.decorator_list):
        del (arguments.posonlyargs or arguments.args)[:1]
    returns = ast.unparse(node.returns) if node.returns and node.name != "__init__" else ""
    return f"({ast.unparse(arguments)})", returns


def rewritten(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Put a docstring into reStructuredText, in place: signs escaped but in examples, and sections as fields.

    Of attributes and constants there are no sections: napoleon would take what is before a colon for their type.
    """
    paragraphs = "\n".join(lines).split("\n\n")
    text = "\n\n".join(
        paragraph if paragraph.lstrip().startswith(">>>") else escaped(paragraph) for paragraph in paragraphs
    )
    if what not in ("attribute", "data", "property"):
        text = str(GoogleDocstring(text, Config(), app, what, name, value, options))
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to autodoc."""
    app.connect("autodoc-process-signature", written_signature)
    app.connect("autodoc-process-docstring", rewritten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
