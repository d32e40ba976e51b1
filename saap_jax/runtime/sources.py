"""Python files of users: run, and digested, with the modules of their own that they import.

A file is one with the modules of its folder (or below) that it imports, directly or by one another, wherever in the
code the import stands. Files of a package also reach the modules of that package. Installed libraries and this package
are none of it, nor is what is imported by a name that the code computes.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import itertools
import os
import runpy
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HOME = Path(__file__).parents[1]
"""The folder of this package."""

_INSTALLED = ("site-packages", "dist-packages")
_BEGAN = time.time_ns()
_loaded: dict[Path, bytes] = {}
"""Content of each module of users when it was imported for a file that was run here."""


def source_digest(file: Path) -> str:
    """Compute the SHA-256 of a file and of the modules of its folder that it imports; of one alone, that of its bytes.

    Modules count by their place below the folder, so that a folder which was moved has the same digest.
    """
    file = file.resolve()
    digest = hashlib.sha256(_read(file).content)
    for module in user_sources(file):
        if module == file:
            continue
        name = os.path.relpath(module, file.parent)
        digest.update(f"{name};{hashlib.sha256(_read(module).content).hexdigest()};".encode())
    return digest.hexdigest()


def user_sources(file: Path) -> list[Path]:
    """List a file and the modules of its folder that it imports."""
    file = file.resolve()
    return sorted(_sources(file, _reach(file)))


def run_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Run a file as `python FILE` does, and return its names: its directory comes first where modules are searched.

    It stays among them, as the last one, for what is imported when a function of the file is called. Modules of its
    folder that have changed since they were imported are imported anew.
    """
    file = Path(path).resolve()
    contents = _forget_changed(file)
    place = str(file.parent)
    sys.path.insert(0, place)
    try:
        return runpy.run_path(str(path))
    finally:
        if place in sys.path:  # a file may set its own
            sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)
        for _, module in _imported(contents):
            _loaded[module] = contents[module]


# --- what a file imports ---------------------------------------------------------------------------


class _Source(NamedTuple):
    content: bytes
    imports: tuple[tuple[int, str], ...]
    """How many folders up (0: an absolute import), and the dotted name, also of what may be no module."""


def _read(file: Path) -> _Source:
    about = file.stat()
    return _parsed(file, about.st_mtime_ns, about.st_ctime_ns, about.st_size)


@functools.cache
def _parsed(file: Path, *_: int) -> _Source:
    """Read a file and find the names that it imports; by its stamps, so that it is read again once it has changed."""
    content = file.read_bytes()
    found: list[tuple[int, str]] = []
    nodes: Iterator[ast.AST] = iter(())
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):  # whoever runs the file says so
        nodes = ast.walk(ast.parse(content))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found += [(node.level, f"{base}.{alias.name}".strip(".")) for alias in node.names]
    return _Source(content, tuple(dict.fromkeys(found)))


class _Reach(NamedTuple):
    folder: Path
    """Modules below it are the user's."""
    roots: tuple[Path, ...]
    """Where absolute imports are looked up."""


def _reach(file: Path) -> _Reach:
    """Tell where the modules are that a file may import and that are its user's."""
    folder = file.parent
    if folder.name in _INSTALLED:  # a module beside others that are none of its user's
        return _Reach(file, ())
    above = folder
    while (above / "__init__.py").is_file():
        above = above.parent
    if above == folder:
        return _Reach(folder, (folder,))
    package = above / folder.relative_to(above).parts[0]
    return _Reach(package, (folder, above))


def _sources(file: Path, reach: _Reach) -> set[Path]:
    """Find a file and all modules of its user that it imports."""
    found = {file}
    waiting = [file]
    while waiting:
        source = waiting.pop()
        for level, name in _read(source).imports:
            if level == 0:
                starts = reach.roots
            else:
                starts = source.parents[level - 1 : level]
            for module in (each for start in starts for each in _modules(start, name)):
                if module not in found and reach.folder in module.parents and HOME not in module.parents:
                    found.add(module)
                    waiting.append(module)
    return found


def _modules(start: Path, name: str) -> Iterator[Path]:
    """Yield the files of the modules that are imported with a dotted name, packages on the way included."""
    place = start
    for part in name.split("."):
        for file in (place / part / "__init__.py", place / f"{part}.py"):
            if file.is_file():
                yield file.resolve()
        place = place / part


# --- what is imported already ----------------------------------------------------------------------


def _imported(sources: Collection[Path]) -> list[tuple[str, Path]]:
    """List name and file of those modules of some files that are imported."""
    names = {each.name for each in sources}
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and isinstance(file, str) and Path(file).name in names:
            found.append((name, Path(file).resolve()))
    return [(name, file) for name, file in found if file in sources]


def _forget_changed(file: Path) -> dict[Path, bytes]:
    """Take out of what is imported what a file would not import if nothing were: its modules that have changed since,
    those that import one that has, and modules of another folder that have the names of its own.

    Returns:
        What the files of all its modules hold now.
    """
    reach = _reach(file)
    contents = {each: _read(each).content for each in _sources(file, reach)}
    imported = _imported(contents)
    changed = {module for _, module in imported if _has_changed(module, contents[module])}
    for name, module in imported:
        if changed & _sources(module, reach):
            _forget(name)
    for module, root in itertools.product(contents, reach.roots):
        name = _name(module, root)
        there = getattr(sys.modules.get(name), "__file__", None) or module
        if Path(there).resolve() != module and Path(there).resolve() in _loaded:
            _forget(name)
    importlib.invalidate_caches()
    return contents


def _name(module: Path, root: Path) -> str:
    """Tell by which name a module is imported where its root is searched, empty of one that is not below it."""
    if root in module.parents:
        parts = module.relative_to(root).with_suffix("").parts
    else:
        parts = ()
    return ".".join(parts).removesuffix(".__init__")


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:  # where `from PARENT import LAST` looks first
        vars(sys.modules[parent]).pop(last, None)
    if cached := getattr(module, "__cached__", None):  # it knows a source by its size and the second
        with contextlib.suppress(OSError):
            os.unlink(cached)


def _has_changed(module: Path, content: bytes) -> bool:
    """Say whether a module may be another than was imported; of one that somebody else imported, whether its file is
    younger than this process."""
    if module in _loaded:
        return _loaded[module] != content
    about = module.stat()
    return max(about.st_mtime_ns, about.st_ctime_ns) > _BEGAN
