"""Sources on the site: what pages link to outside their folder, and where the names of the reference are defined."""

import ast
import functools
import html
import importlib
import inspect
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

LEXERS = {".py": "python", ".toml": "toml", ".json": "json", ".yml": "yaml", ".md": "markdown"}
PAGES = {"CONTRIBUTING.md": "contributing"}
"""Files of the project that are pages of the site by another name."""

ROOT = Path(__file__).parents[3]

logger = logging.getLogger(__name__)


class OutsideLinks(SphinxTransform):
    """Point links that leave the folder of pages to rendered sources, before Sphinx looks for pages or downloads."""

    default_priority = 5

    def apply(self, **options: Any) -> None:
        """Replace links, and keep what they point to."""
        folder = posixpath.dirname(self.env.docname)
        links = (node for kind in (addnodes.pending_xref, addnodes.download_reference)
                 for node in self.document.findall(kind))  # fmt: skip
        for node in [link for link in links if link.get("reftype") == "myst"]:
            target, _, anchor = node["reftarget"].partition("#")
            path = posixpath.normpath(posixpath.join("docs", folder, target))
            if path.startswith("docs/") or not target.startswith(".."):
                continue
            if not (ROOT / path).exists() or path.startswith(".."):
                logger.warning("link to %s: expected a file of the project, found none", target, location=node)
                continue
            if path in PAGES:
                node.replace_self(_page_link(node, self.env.docname, PAGES[path], anchor))
                continue
            _linked(self.env).setdefault(self.env.docname, set()).add(path)
            reference = addnodes.pending_xref(
                "", *node.children, refdomain="", reftype="source", reftarget=path, refdoc=self.env.docname
            )
            node.replace_self(reference)


def _page_link(node: nodes.Element, docname: str, page: str, anchor: str) -> nodes.Element:
    kept = {"refdoc": docname, "reftype": "myst", "refexplicit": True, "reftargetid": anchor or None}
    return addnodes.pending_xref("", *node.children, refdomain="doc", reftarget=page, **kept)


def _linked(env: BuildEnvironment) -> dict[str, set[str]]:
    if not hasattr(env, "saapsite_sources"):
        env.saapsite_sources = {}  # type: ignore[attr-defined]
    return env.saapsite_sources  # type: ignore[attr-defined]


def page_of(path: str) -> str:
    """Return the page of a file or folder, given from the root of the project."""
    return f"source/{path}"


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Node) -> nodes.Node | None:
    """Return the link to a source, on the site or in the repository."""
    if node["reftype"] != "source":
        return None
    path, repository = node["reftarget"], app.config.saapsite_repository
    if repository:
        address = f"{repository.removesuffix('/')}/tree/HEAD/{path}"
    else:
        address = app.builder.get_relative_uri(node["refdoc"], page_of(path))
    return nodes.reference("", "", *node.children, refuri=address, internal=not repository)


def place_of(module: str, name: str) -> tuple[str, int] | None:
    """Return the file, from the root of the project, and the line where a name is defined; None of plain values."""
    try:
        value = functools.reduce(inspect.getattr_static, name.split(".")[1:],
                                 getattr(importlib.import_module(module), name.split(".")[0]))  # fmt: skip
    except AttributeError:  # a field of a dataclass
        return None
    value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return None
    value = inspect.unwrap(value)
    file = Path(inspect.getsourcefile(value) or "").resolve()
    if not file.is_relative_to(ROOT / "saap_jax"):
        return None
    return file.relative_to(ROOT).as_posix(), inspect.getsourcelines(value)[1]


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return the link from a page of the reference, in `api`, to the source of a name; for `sphinx.ext.linkcode`."""
    place = place_of(info["module"], info["fullname"]) if info["module"] else None
    return f"../{page_of(place[0])}.html#L-{place[1]}" if place else None


def _defining(env: BuildEnvironment) -> set[str]:
    """Return the files in which the names of the reference are defined."""
    objects = env.domains.python_domain.objects
    places = (place_of(*_split(name)) for name in objects)
    return {place[0] for place in places if place}


def _split(path: str) -> tuple[str, str]:
    """Return the module of a full name, and the rest."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            importlib.import_module(module := ".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return module, ".".join(parts[count:])
    raise ValueError(f"{path}: expected a name of a module, found no module")


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the pages of what is linked, and of the files of folders that are."""
    linked = {path for paths in _linked(app.env).values() for path in paths} | _defining(app.env)
    for path in sorted({file for each in linked for file in (each, *_files(each))}):
        body = _listing(app, path) if (ROOT / path).is_dir() else _text(app, ROOT / path)
        yield page_of(path), {"title": path, "parents": [], "body": f"<h1>{html.escape(path)}</h1>{body}"}, "page.html"


def _files(path: str) -> list[str]:
    """Return the files of a folder that are shown; none of a file."""
    inside = (ROOT / path).glob("*")
    return sorted(f"{path}/{each.name}" for each in inside if each.suffix in LEXERS and each.name[0] != "_")


def _listing(app: Sphinx, path: str) -> str:
    here, rows = page_of(path), []
    for file in _files(path):
        address = app.builder.get_relative_uri(here, page_of(file))
        name, about = html.escape(file.rpartition("/")[2]), html.escape(_first_line(ROOT / file))
        rows.append(f'<li><a class="reference internal" href="{address}"><code>{name}</code></a> {about}</li>')
    return f"<ul>{''.join(rows)}</ul>"


def _first_line(file: Path) -> str:
    """Return the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) if file.suffix == ".py" else ""
    return (text or "").partition("\n")[0]


def _text(app: Sphinx, file: Path) -> str:
    return app.builder.highlighter.highlight_block(
        file.read_text("utf-8"), LEXERS.get(file.suffix, "text"), lineanchors="L"
    )


def purge(app: Sphinx, env: BuildEnvironment, name: str) -> None:
    """Forget the links of a page that is read again."""
    _linked(env).pop(name, None)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect."""
    app.add_transform(OutsideLinks)
    app.connect("missing-reference", resolve, priority=100)
    app.connect("env-purge-doc", purge)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
