"""The public names of the package, and whether the reference lists and the source documents each. Needs no Sphinx."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

MODULES = (
    "saap_jax",
    "saap_jax.api",
    "saap_jax.trace.adapters",
    "saap_jax.config",
    "saap_jax.data",
    "saap_jax.structures",
    "saap_jax.estimation",
    "saap_jax.llama",
    "saap_jax.recipes",
    "saap_jax.recovery",
    "saap_jax.subjects.base",
    "saap_jax.surgery",
    "saap_jax.types",
)
"""Modules whose public names the reference lists."""

_BLOCK = re.compile(r"^```\{api\}\n(.*?)^```$", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A public name, and what it stands for."""

    module: str
    name: str
    value: Any

    @property
    def path(self) -> str:
        """Full name."""
        return f"{self.module}.{self.name}"


def documented(path: str) -> bool:
    """Say whether what a full name stands for has a docstring of its own; of a constant, the string that follows it."""
    module_name, _, name = path.rpartition(".")
    module = importlib.import_module(module_name)
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        text = value.__doc__ or ""
        return bool(text.strip()) and not text.startswith(f"{value.__name__}(")  # dataclasses and tuples make such
    return name in _described(module)


def resolve(path: str) -> Any:
    """Return what a full name stands for.

    Raises:
        AttributeError, ModuleNotFoundError: there is no such name.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_symbols(modules: Iterable[str] = MODULES) -> Iterator[Symbol]:
    """Yield the names of `__all__` of each module; of one without it, what it defines without an underscore."""
    for module_name in modules:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or _defined(module):
            value = getattr(module, name)
            if name != "__version__" and not isinstance(value, TypeVar):
                yield Symbol(module_name, name, value)


def listed_names(pages: Iterable[Path]) -> list[str]:
    """Return the full names in the `api` blocks of pages, a name a line."""
    return [name for page in pages for block in _BLOCK.findall(page.read_text("utf-8")) for name in block.split()]


def problems(pages: Iterable[Path], modules: Iterable[str] = MODULES) -> list[str]:
    """Return a line for each public name that no page lists, that is listed twice, or that has no docstring."""
    listed = listed_names(pages)
    twice = [f"{name}: expected once in the reference, got it twice" for name in dict.fromkeys(listed)
             if listed.count(name) > 1]  # fmt: skip
    there = {_identity(name.rpartition(".")[2], resolve(name)) for name in listed}
    absent = [
        f"{symbol.path}: expected in an api block of docs/api, found it in none; add it"
        for symbol in public_symbols(modules)
        if _identity(symbol.name, symbol.value) not in there
    ]
    bare = [f"{name}: expected a docstring, got none" for name in dict.fromkeys(listed) if not documented(name)]
    return [*twice, *absent, *bare]


def _identity(name: str, value: Any) -> tuple[str, int]:
    """Return what two modules agree on that export the same: equal strings may be one object."""
    return name, id(value)


def _defined(module: ModuleType) -> list[str]:
    """Return the public functions and classes that a module defines, and its described constants."""
    own = [
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
    ]
    return [name for name in dict.fromkeys([*own, *_assigned(module)]) if not name.startswith("_")]


def _assigned(module: ModuleType) -> list[str]:
    """Return the names that statements of a module bind, in order."""
    return [name for name, _ in _statements(module)]


@functools.cache
def _described(module: ModuleType) -> set[str]:
    """Return the names of a module that a string right behind their assignment describes."""
    return {name for name, following in _statements(module) if _is_text(following)}


def _statements(module: ModuleType) -> Iterator[tuple[str, ast.stmt | None]]:
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        yield from ((target.id, following) for target in targets if isinstance(target, ast.Name))


def _is_text(statement: ast.stmt | None) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def main() -> int:
    """Print what is wrong with the reference; return the number of lines, at most 1."""
    found = problems(sorted((Path(__file__).parents[2] / "api").glob("*.md")))
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
