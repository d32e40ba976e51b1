"""Where text comes from: a source is written `FORMAT:PATH` (or `builtin:NAME`) and gives documents.

| source                    | documents                                                                          |
|---------------------------|------------------------------------------------------------------------------------|
| `builtin:reference`       | topics of the Python language reference, from the standard library's `pydoc_data`  |
| `builtin:descriptions`    | descriptions of data sets, from the installed tensorflow-datasets package          |
| `text:PATH`               | the file, as one document                                                          |
| `jsonl:PATH#FIELD`        | string FIELD (default `text`) of the JSON object on each line                      |
| `wikitext:PATH`           | a raw WikiText file, as one document, joined as papers join its rows               |
| `ptb:PATH`                | a Penn Treebank file (a sentence a line), as one document, sentences joined by " " |
| `instruct:PATH`           | instructions with responses, see `chat`: Alpaca's    prompt with the response     |
| `tfds:NAME@SPLIT#FIELD`   | text FIELD of a prepared TensorFlow data set's examples, see `tfds_source`         |

A plain path that ends in .txt or .md means `text:`, one that ends in .jsonl (or .jsonl#FIELD) means `jsonl:`. A
relative PATH that does not exist as given is looked up below the directory that the variable SAAP_DATA names. FIELD
stands behind the last #; a path that ends in .jsonl has none.
"""

import ast
import codecs
import difflib
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saap_jax.data.chat import Exchange, exchange_of
from saap_jax.errors import fields_of, parse_json, read_lines, reading
from saap_jax.extras import need
from saap_jax.wings import wing

Part = Literal["calibration", "evaluation", "all"]
"""Which of a built-in source's documents to read; a file is always read whole."""

SHORT = 100
"""Characters below which two equal documents are taken for a coincidence ("Yes."), not for an overlap."""

REPEATED = 40
"""Characters from which a paragraph that a built-in source repeats is left out the second time."""


class Document(NamedTuple):
    """A piece of running text; `name` tells it apart from the others of its source."""

    name: str
    text: str


class Source(NamedTuple):
    """A parsed source: `FORMAT:PATH`, and the field of a JSON line or of a TFDS example (else empty)."""

    format: str
    path: str
    field: str = ""


def parse_source(source: str) -> Source:
    """Split a source's text into format, path and field, without looking at any file.

    Raises ValueError for an unknown format or built-in name, with the nearest known one.

    >>> parse_source("jsonl:web/c4.jsonl#text")
    Source(format='jsonl', path='web/c4.jsonl', field='text')
    >>> parse_source("notes.md")
    Source(format='text', path='notes.md', field='')
    >>> parse_source("c#4.jsonl"), parse_source("c#4.jsonl#raw").field
    (Source(format='jsonl', path='c#4.jsonl', field='text'), 'raw')
    """
    kind, colon, path = source.partition(":")
    if not colon:
        if Path(source).suffix in _SUFFIXES:
            file = source
        else:
            file = source.rpartition("#")[0]
        kind = _SUFFIXES.get(Path(file).suffix, "")
        path = source
    if not path or (kind not in (*FORMATS, "tfds") and not (kind == "builtin" and path in BUILTIN)):
        known = {name: f"builtin:{name}" for name in BUILTIN}
        known |= {name: name for name in known.values()} | {name: f"{name}:PATH" for name in FORMATS}
        known["tfds"] = "tfds:NAME"
        near = [each for text in (source, kind or source) for each in difflib.get_close_matches(text, known, 1)]
        raise ValueError(
            f"data source {source!r}: expected one of {', '.join(dict.fromkeys(known.values()))}, or a path ending in "
            f"{', '.join(_SUFFIXES)}" + (f"; did you mean {known[near[0]]}?" if near else "")
        )
    if kind not in ("jsonl", "tfds"):
        return Source(kind, path)
    path, _, field = path.rpartition("#") if "#" in path and not path.endswith(".jsonl") else (path, "", "")
    if kind == "tfds":
        wing("tfds").parse_reference(source, path)
    return Source(kind, path, field or "text")


def read_texts(source: str, part: Part = "all") -> tuple[Document, ...]:
    """Read the documents of a source, in an order that never changes; those of nothing but white space are left out.

    `part` chooses among the documents of a built-in source, whose two parts are fixed (see `part_of`) and share no
    paragraph. A file has no parts: keep calibration and evaluation apart by giving them different files, which
    `check_disjoint` verifies. Raises ValueError for an unknown source and for a file that is empty, not UTF-8 or not
    in its format; FileNotFoundError for a missing one.
    """
    kind, path, field = parse_source(source)
    if kind == "builtin":
        found = [(name, text) for name, text in BUILTIN[path]() if part in ("all", part_of(name))]
    elif kind == "tfds":
        found = wing("tfds").read_examples(source, path, field, part)
    else:
        found = FORMATS[kind](_find(source, path), source, field)
    documents = tuple(Document(name, text) for name, text in found if text.strip())
    if not documents:
        raise ValueError(f"data source {source!r}: expected text, found none; give a file that is not empty")
    return documents


def read_exchanges(source: str, part: Part = "all") -> tuple[Exchange, ...]:
    """Read the instructions and responses of a source `instruct:PATH`; raises as `read_texts`."""
    path = _find(source, parse_source(source).path)
    return tuple(exchange_of(name, record, source) for name, record in _records(path, source))


def source_files(source: str) -> list[Path]:
    """List the files that say whether a source has changed: its own; of a built-in text, one of its package.

    Of a prepared TensorFlow data set, none.

    Raises:
        ValueError: an unknown source.
        FileNotFoundError: no such file.
    """
    kind, path, _ = parse_source(source)
    if kind == "tfds":
        return []
    if kind != "builtin":
        return [_find(source, path)]
    found = importlib.util.find_spec(_HOMES[path])  # which imports nothing of it
    if found is None or found.origin is None:
        return []
    return [Path(found.origin)]


def join_texts(documents: Sequence[Document]) -> str:
    """Join documents into one text, a blank line between any two."""
    return "\n\n".join(document.text for document in documents)


def part_of(name: str) -> Literal["calibration", "evaluation"]:
    """Tell the part that a built-in document of this name belongs to: the lowest bit of the name's SHA-256.

    It depends on nothing else, so no seed and no other version of the installed packages moves a document across.
    """
    if hashlib.sha256(name.encode()).digest()[0] & 1:
        return "evaluation"
    return "calibration"


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Refuse a file, or a document of at least 100 characters, that is used for calibration and for evaluation.

    Files are compared by content, so that copies and links count as the same; documents by their words. Built-in
    sources are compared by their calibration and evaluation parts, and pass. Raises ValueError.
    """
    seen = {digest: source for source in calibration for digest, _ in _fingerprints(source, "calibration")}
    for source in evaluation:
        for digest, what in _fingerprints(source, "evaluation"):
            if digest in seen:
                raise ValueError(
                    f"data: {what} of evaluation source {source!r} is also in calibration source {seen[digest]!r}; "
                    "calibrate on one text and evaluate on another"
                )


def _fingerprints(source: str, part: Part) -> Iterator[tuple[str, str]]:
    """Yield (digest, what it is the digest of) for a source's file and for each of its longer documents."""
    parsed = parse_source(source)
    if parsed.format not in ("builtin", "tfds"):
        with open(_find(source, parsed.path), "rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest(), "the file"
    for document in read_texts(source, part):
        if len(document.text) >= SHORT:
            yield hashlib.sha256(_words(document.text).encode()).hexdigest(), f"document {document.name!r}"


def _words(text: str) -> str:
    return " ".join(text.split())


# --- files -------------------------------------------------------------------------------------------


def _find(source: str, path: str) -> Path:
    """Find the file: the path as given, or below SAAP_DATA."""
    root = os.environ.get("SAAP_DATA")
    for candidate in (Path(os.path.expanduser(path)), *([Path(root) / path] if root else [])):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"data source {source!r}: expected a file {path}, found none here nor below "
        f"{f'SAAP_DATA={root}' if root else 'SAAP_DATA, which is not set'}; check the path"
    )


def _decoded(path: Path, source: str) -> str:
    """Read a file as UTF-8, with `\\n` line ends and without a byte order mark."""
    with reading(f"data source {source!r}", "text in UTF-8"):
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


def _records(path: Path, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and object of each line of JSON; blank lines are passed over."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"data source {source!r}: line {number}"
        record = parse_json(line.removeprefix(codecs.BOM_UTF8), where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        yield f"line {number}", record


def _read_jsonl(path: Path, source: str, field: str) -> Iterator[tuple[str, str]]:
    for name, record in _records(path, source):
        if not isinstance(value := record.get(field), str):
            raise ValueError(
                f"data source {source!r}: {name}: expected a string field {field!r}, "
                f"found fields: {fields_of(record)}; name one as PATH#FIELD"
            )
        yield name, value


def _read_text(path: Path, source: str, field: str) -> Iterator[tuple[str, str]]:
    yield source, _decoded(path, source)


def _read_wikitext(path: Path, source: str, field: str) -> Iterator[tuple[str, str]]:
    """Join the rows as `"\\n\\n".join(dataset["text"])` does, where a blank row is "" and others keep their `\\n`."""
    rows = _decoded(path, source).removesuffix("\n").split("\n")
    yield source, "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def _read_ptb(path: Path, source: str, field: str) -> Iterator[tuple[str, str]]:
    yield source, " ".join(row.strip() for row in _decoded(path, source).split("\n") if row.strip())


def _read_instruct(path: Path, source: str, field: str) -> Iterator[tuple[str, str]]:
    return ((each.name, each.prompt + each.response) for each in read_exchanges(source))


FORMATS: dict[str, Callable[[Path, str, str], Iterator[tuple[str, str]]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "wikitext": _read_wikitext,
    "ptb": _read_ptb,
    "instruct": _read_instruct,
}
"""Format of a file -> reader of names and texts from (the file, source as written, field)."""

_SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl"}


# --- built in ----------------------------------------------------------------------------------------


@functools.cache
def _reference() -> tuple[Document, ...]:
    try:
        from pydoc_data.topics import topics  # some distributions leave it out
    except ImportError:
        raise ValueError(
            "data source 'builtin:reference': this Python has no module pydoc_data; install its full standard library"
        ) from None
    return _unrepeated((name, topics[name]) for name in sorted(topics))


@functools.cache
def _descriptions() -> tuple[Document, ...]:
    # The package is only found, never imported: importing it takes seconds and reading its text needs no code of it.
    need("tfds", "data source 'builtin:descriptions', in whose place a text of yours may stand")
    spec = importlib.util.find_spec("tensorflow_datasets")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    readmes = sorted(root.glob("datasets/*/README.md"))
    found = [(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in readmes]
    return _unrepeated([*found, *_description_constants(root)])


def _description_constants(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the string constants `…_DESCRIPTION` of the data-set modules below `root`, except templates with `{…}`."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("core/", "scripts/", "testing/")) or name.endswith("_test.py"):
            continue
        code = path.read_text(encoding="utf-8")
        if "_DESCRIPTION" not in code:
            continue
        for node in ast.parse(code).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=constant)], value=ast.Constant(value=str(text))):
                    if constant.endswith("_DESCRIPTION") and not re.search(r"\{\w*\}", text):
                        yield f"{name}:{constant}", text


def _unrepeated(documents: Iterable[tuple[str, str]]) -> tuple[Document, ...]:
    """Leave out each paragraph that an earlier document, or this one, has had already.

    Half of the reference's topics are chapters that hold other topics whole: without this, what is calibrated on
    would come back in the evaluation.
    """
    seen = set()
    kept = []
    for name, text in documents:
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = _words(paragraph)
            if len(words) < REPEATED or words not in seen:
                fresh.append(paragraph.rstrip())
            seen.add(words)
        kept.append(Document(name, "\n\n".join(fresh).strip("\n")))
    return tuple(kept)


BUILTIN: dict[str, Callable[[], tuple[Document, ...]]] = {"reference": _reference, "descriptions": _descriptions}
"""Name of a built-in source -> its documents, read without network or files of the user."""

_HOMES = {"reference": "pydoc_data.topics", "descriptions": "tensorflow_datasets"}
"""Name of a built-in source -> the module that it comes with."""
