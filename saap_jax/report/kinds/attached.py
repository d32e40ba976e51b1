"""Figures and tables that a run's command wrote as files, shown as they are: NAME.svg, NAME.md, NAME.csv.

This is how kinds of runs that have no sections of their own come onto a page. A drawing is taken only if it is nothing
but a drawing: no script, no style sheet, no address outside of itself, since a run directory may be somebody else's.
"""

import re
from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

from saap_jax.report.page.blocks import Block, Bullets, Detail, Download, Part, Picture, Section, Words, plain_table
from saap_jax.report.rows import Record

_KNOWN = ("frontier", "sensitivity", "fidelity")
"""Names that are shown where they lie in the directory, whether or not the record claims them."""

_LARGEST = 2**20
"""Bytes of a drawing at most."""

_DRAWN = {
    "svg", "g", "defs", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "title",
    "desc", "clipPath", "use", "image", "linearGradient", "radialGradient", "stop",
}  # fmt: skip
"""What a drawing may be made of."""


def attached_sections(path: Path, run: Record, detail: Detail, *, shown: Collection[str] = ()) -> list[Section]:
    """Return a section a name that the run has files of, but for those that are `shown` elsewhere.

    Suggestions that the record holds are left out of its files: they have a section of their own.
    """
    claimed = [Path(name).stem for name in run.get("files", []) if name.endswith((".svg", ".md", ".csv"))]
    names = [name for name in dict.fromkeys([*claimed, *_KNOWN]) if name not in shown and name != "report"]
    repeated = ("Suggestions",) if run.get("suggestions") else ()
    sections: list[Section] = []
    for name in names:
        blocks = _blocks(path, name, detail, repeated)
        if sections and blocks and all(block.kind == "download" for block in blocks):
            sections[-1] = sections[-1]._replace(blocks=[*sections[-1].blocks, *blocks])
        elif blocks:
            sections.append(Section(f"file-{slug(name)}", name.replace("_", " ").capitalize(), blocks))
    return sections


def drawing(path: Path) -> str:
    """Return a drawing, empty where there is none, or where it is more than a drawing."""
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, UnicodeDecodeError):
        return ""
    begin = re.match(r"\s*(<\?xml[^<>]*\?>\s*)?(?=<svg\b)", text)  # so no DOCTYPE, and no entities
    if begin is None or any(map(_unsafe, root.iter())):
        return ""
    return text[begin.end() :].strip()


def markdown_blocks(text: str, leave_out: Collection[str] = ()) -> list[Block]:
    """Return headings, tables, lists and paragraphs of Markdown as a run writes it.

    `leave_out` names headings that are left out with all that stands below them.
    """
    blocks: list[Block] = []
    for table, group in groupby(text.splitlines(), lambda line: line.lstrip().startswith("|")):
        lines = list(group)
        blocks += [_table(lines)] if table and len(lines) > 1 else list(_prose(lines))
    shown, out = [], False
    for block in blocks:
        out = block.title in leave_out if isinstance(block, Part) else out
        shown += [] if out else [block]
    return shown


def slug(name: str) -> str:
    """Return a name as part of an identifier or a file's name.

    >>> slug("gate_fisher, λ=0.25")
    'gate_fisher-0.25'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "x"


def _blocks(path: Path, name: str, detail: Detail, repeated: Collection[str]) -> list[Block]:
    blocks: list[Block] = []
    svg, markdown, table = (path / f"{name}.{ending}" for ending in ("svg", "md", "csv"))
    if detail.drawn and (drawn := drawing(svg)):
        blocks.append(Picture(name, drawn, wide=True))
    elif svg.is_file():
        why = "is in the run's own directory" if not detail.drawn else "is no plain drawing, and is not shown"
        blocks.append(Words(f"The figure {svg.name} {why}."))
    if markdown.is_file():
        blocks += markdown_blocks(markdown.read_text(encoding="utf-8"), repeated)
    if detail.downloads and table.is_file() and table.stat().st_size <= _LARGEST:
        blocks.append(Download(f"{table.name}, full precision", table.name, table.read_text(encoding="utf-8")))
    return blocks


def _prose(lines: list[str]) -> Iterator[Block]:
    for kind, group in groupby(lines, _kind):
        texts = [re.sub(r"\\(.)", r"\1", line.strip().lstrip("#").strip()) for line in group]
        if kind == "heading":
            yield from (Part(text, []) for text in texts)
        elif kind == "bullet":
            yield Bullets([text.removeprefix("-").removeprefix("*").strip() for text in texts])
        elif kind == "text":
            yield Words(" ".join(texts), soft=False)


def _kind(line: str) -> str:
    line = line.strip()
    if not line:
        return ""
    return "heading" if line.startswith("#") else "bullet" if line.startswith(("- ", "* ")) else "text"


def _table(lines: list[str]) -> Block:
    split = (re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines)
    rows = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells] for cells in split]
    words = next((i for i, cell in enumerate(rows[1]) if cell.endswith(":")), len(rows[1]))
    return plain_table(" ".join(rows[0]), rows[0], rows[2:], words=max(words, 1))


def _unsafe(element: ElementTree.Element) -> bool:
    tag = str(element.tag).rpartition("}")[2]
    if tag not in _DRAWN:
        return True
    for name, value in element.attrib.items():
        name = name.rpartition("}")[2].lower()
        outside = name in ("href", "src") and not value.startswith(("#", "data:image/png;base64,"))
        if name.startswith("on") or outside or re.search(r"url\((?!#)|javascript:|@import", value):
            return True
    return False
